// Which instruction set this machine offers, found at run time (CPUID, operating system
// support by XGETBV, and permission for AMX tiles from Linux).
#pragma once

#include <string>
#include <vector>

namespace chiliad {

#if CHILIAD_HAS_AMX_EMULATED
#define CHILIAD_IF_EMULATED(...) __VA_ARGS__
#else
#define CHILIAD_IF_EMULATED(...)
#endif

// In rising order; each includes the ones before it.
enum class Isa : int {
  generic,       // any machine: what the compiler's baseline offers
  avx2,          // AVX2, FMA, F16C
  avx512,        // AVX-512 F, BW, VL, DQ, VNNI
  avx512bf16,    // + BF16, VBMI
  amx,           // + AMX tile, bf16, int8
  amx_emulated,  // amx with its tiles in software: in builds for tests only, see tiles.h
};

const char* isa_name(Isa isa);

// Every instruction set that this build holds and this machine may run, in rising order.
const std::vector<Isa>& available_isas();

// "auto" (the highest real one) or a name. Throws std::invalid_argument if unknown or not available here.
Isa choose_isa(const std::string& name);

// A per-ISA file <name>.inl ends with CHILIAD_EXPORT(Type, name) = {...}: its table of functions.
// Elsewhere, after CHILIAD_TABLES(Type, name), `name(isa)` is the table of that instruction set.
#define CHILIAD_CONCAT_(a, b) a##_##b
#define CHILIAD_CONCAT(a, b) CHILIAD_CONCAT_(a, b)
#define CHILIAD_EXPORT(Type, name)                     \
  extern const Type CHILIAD_CONCAT(name, CHILIAD_ISA); \
  const Type CHILIAD_CONCAT(name, CHILIAD_ISA)

#if CHILIAD_HAS_AVX2
#define CHILIAD_TABLES(Type, name)                                                                        \
  extern const Type name##_generic, name##_avx2, name##_avx512, name##_avx512bf16,                        \
      name##_amx CHILIAD_IF_EMULATED(, name##_amx_emulated);                                              \
  static inline const Type& name(Isa isa) {                                                               \
    static const Type* const tables[] = {&name##_generic, &name##_avx2, &name##_avx512,                   \
                                         &name##_avx512bf16, &name##_amx                                  \
                                         CHILIAD_IF_EMULATED(, &name##_amx_emulated)};                    \
    return *tables[static_cast<int>(isa)];                                                                \
  }
#else
#define CHILIAD_TABLES(Type, name)  \
  extern const Type name##_generic; \
  static inline const Type& name(Isa) { return name##_generic; }
#endif

}  // namespace chiliad
