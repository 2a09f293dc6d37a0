// Which instruction set this machine offers, found at run time (CPUID, operating system
// support by XGETBV, and permission for AMX tiles from Linux).
#pragma once

#include <string>
#include <vector>

namespace chiliad {

// In rising order; each includes the ones before it.
enum class Isa : int {
  generic,     // any machine: what the compiler's baseline offers
  avx2,        // AVX2, FMA, F16C
  avx512,      // AVX-512 F, BW, VL, DQ, VNNI
  avx512bf16,  // + BF16
  amx,         // + AMX tile, bf16, int8
};

const char* isa_name(Isa isa);

// Every instruction set that this build holds and this machine may run, in rising order.
const std::vector<Isa>& available_isas();

// "auto" or a name. Throws std::invalid_argument if unknown or not available here.
Isa choose_isa(const std::string& name);

}  // namespace chiliad
