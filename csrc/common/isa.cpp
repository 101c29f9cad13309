#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moekern {
namespace {

#if defined(__x86_64__)

// The tile registers are off until a process asks Linux for them (arch_prctl, since 5.16).
bool amx_granted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// __builtin_cpu_supports checks XCR0 too: a set whose registers the operating system does not save is not
// reported. GCC 12 knows the names up to avx512vnni; the rest are bits of leaf 7, which say nothing of XCR0.
std::vector<CpuFeature> detect_features() {
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;
  const unsigned d0 = __get_cpuid_count(7, 0, &a, &b, &c, &d) ? d : 0;
  const unsigned a1 = __get_cpuid_count(7, 1, &a, &b, &c, &d) ? a : 0;
  const bool avx512 = __builtin_cpu_supports("avx512f");
  const bool tiles = (d0 & 1u << 24) != 0 && amx_granted();
  const unsigned leaf1_c = __get_cpuid(1, &a, &b, &c, &d) ? c : 0;
  return {
      {"avx2", __builtin_cpu_supports("avx2") != 0},
      {"fma", __builtin_cpu_supports("fma") != 0},
      {"f16c", __builtin_cpu_supports("avx") && (leaf1_c & 1u << 29) != 0},
      {"avx512f", avx512},
      {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
      {"avx512dq", __builtin_cpu_supports("avx512dq") != 0},
      {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
      {"avx512_vnni", __builtin_cpu_supports("avx512vnni") != 0},
      {"avx512_bf16", avx512 && (a1 & 1u << 5) != 0},
      {"avx512_fp16", avx512 && (d0 & 1u << 23) != 0},
      {"amx_tile", tiles},
      {"amx_bf16", tiles && (d0 & 1u << 22) != 0},
      {"amx_int8", tiles && (d0 & 1u << 25) != 0},
  };
}

#else

std::vector<CpuFeature> detect_features() { return {}; }

#endif

bool usable(std::initializer_list<const char*> names) {
  for (const char* name : names) {
    bool found = false;
    for (const CpuFeature& feature : cpu_features()) {
      found = found || (feature.usable && std::string(feature.name) == name);
    }
    if (!found) return false;
  }
  return true;
}

Isa detect() {
  if (!usable({"avx2", "fma", "f16c"})) return Isa::kPortable;
  if (!usable({"avx512f", "avx512bw", "avx512dq", "avx512vl"})) return Isa::kAvx2;
  if (!usable({"avx512_bf16"})) return Isa::kAvx512;
  return usable({"amx_tile", "amx_bf16"}) ? Isa::kAmx : Isa::kAvx512Bf16;
}

Isa requested(Isa best) {
  const char* name = std::getenv("MOEKERN_CPU_ISA");
  if (name == nullptr || *name == '\0') return best;
  for (int i = 0; i <= static_cast<int>(Isa::kAmx); ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (std::string(name) != isa_name(isa)) continue;
    if (isa > best) {
      throw std::runtime_error(std::string("MOEKERN_CPU_ISA: this machine does not run ") + name +
                               "; its best is " + isa_name(best));
    }
    return isa;
  }
  throw std::runtime_error(std::string("MOEKERN_CPU_ISA: unknown instruction set '") + name +
                           "'; expected portable, avx2, avx512, avx512bf16 or amx");
}

std::atomic<int> g_isa{-1};

}  // namespace

const std::vector<CpuFeature>& cpu_features() {
  static const std::vector<CpuFeature> features = detect_features();
  return features;
}

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};
  return kNames[static_cast<int>(isa)];
}

void refresh_cpu_isa() {
  static const Isa best = detect();
  g_isa.store(static_cast<int>(requested(best)), std::memory_order_relaxed);
}

Isa cpu_isa() {
  if (g_isa.load(std::memory_order_relaxed) < 0) refresh_cpu_isa();
  return static_cast<Isa>(g_isa.load(std::memory_order_relaxed));
}

}  // namespace moekern
