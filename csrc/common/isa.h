// Instruction sets of the CPU kernels. Every csrc/ops/*/cpu.cpp is compiled once per set, into namespace
// moekern::MOEKERN_ISA, and the best set that this machine runs is chosen at run time.
#pragma once

namespace moekern {

// In ascending order: a machine that runs one runs all before it.
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The best set that was built, that the processor has and that the operating system lets us use; lowered by
// MOEKERN_CPU_ISA=portable|avx2|avx512|avx512bf16|amx, which is read once.
Isa cpu_isa();

// Its name, as in MOEKERN_CPU_ISA.
const char* isa_name(Isa isa);

// Reads MOEKERN_CPU_ISA again. Throws std::runtime_error for an unknown name or a set that cannot run here.
void refresh_cpu_isa();

}  // namespace moekern

#if defined(__x86_64__)
// Declares a CPU kernel in every instruction set, and `fn` itself, which calls the chosen one.
#define MOEKERN_CPU_KERNEL(fn, Params)                 \
  namespace portable {                                 \
  void fn(const Params& p);                            \
  }                                                    \
  namespace avx2 {                                     \
  void fn(const Params& p);                            \
  }                                                    \
  namespace avx512 {                                   \
  void fn(const Params& p);                            \
  }                                                    \
  namespace avx512bf16 {                               \
  void fn(const Params& p);                            \
  }                                                    \
  namespace amx {                                      \
  void fn(const Params& p);                            \
  }                                                    \
  inline void fn##_cpu(const Params& p) {              \
    switch (cpu_isa()) {                               \
      case Isa::kAmx: return amx::fn(p);               \
      case Isa::kAvx512Bf16: return avx512bf16::fn(p); \
      case Isa::kAvx512: return avx512::fn(p);         \
      case Isa::kAvx2: return avx2::fn(p);             \
      case Isa::kPortable: return portable::fn(p);     \
    }                                                  \
  }
#else
#define MOEKERN_CPU_KERNEL(fn, Params) \
  namespace portable {                 \
  void fn(const Params& p);            \
  }                                    \
  inline void fn##_cpu(const Params& p) { return portable::fn(p); }
#endif
