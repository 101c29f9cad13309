#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

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

bool amx_bf16_reported() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & 1u << 22) != 0 && (d & 1u << 24) != 0;  // AMX-BF16, AMX-TILE
}

bool avx512_bf16_reported() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5) != 0;
}

// __builtin_cpu_supports checks XCR0 too: a set whose registers the operating system does not save is not
// reported.
Isa detect() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!avx2) return Isa::kPortable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Isa::kAvx2;
  if (!avx512_bf16_reported()) return Isa::kAvx512;
  return amx_bf16_reported() && amx_granted() ? Isa::kAmx : Isa::kAvx512Bf16;
}

#else

Isa detect() { return Isa::kPortable; }

#endif

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
