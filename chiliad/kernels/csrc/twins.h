// A table of functions that each .inl defines once per instruction set: the .inl defines
// CHILIAD_TWIN(name); others declare all of them with CHILIAD_TWINS(Type, name) and choose with
// name(isa).
#pragma once

#include "isa.h"

#define CHILIAD_PASTE2(a, b) a##_##b
#define CHILIAD_PASTE(a, b) CHILIAD_PASTE2(a, b)
#define CHILIAD_TWIN(name) CHILIAD_PASTE(name, CHILIAD_ISA)

#if CHILIAD_HAS_AMX
#define CHILIAD_TWINS(Type, name)                                                          \
  extern const Type name##_generic, name##_avx2, name##_avx512, name##_avx512bf16, name##_amx; \
  inline const Type& name(Isa isa) {                                                       \
    switch (isa) {                                                                         \
      case Isa::amx: return name##_amx;                                                    \
      case Isa::avx512bf16: return name##_avx512bf16;                                      \
      case Isa::avx512: return name##_avx512;                                              \
      case Isa::avx2: return name##_avx2;                                                  \
      default: return name##_generic;                                                      \
    }                                                                                      \
  }
#else
#define CHILIAD_TWINS(Type, name)    \
  extern const Type name##_generic;  \
  inline const Type& name(Isa) { return name##_generic; }
#endif
