#include "isa.h"

#include <cstdint>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace chiliad {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512bf16",
                                  "amx" CHILIAD_IF_EMULATED(, "amx_emulated")};

#if defined(__x86_64__)

bool bit(std::uint32_t word, int index) { return (word >> index) & 1; }

std::uint64_t xgetbv() {
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

// Linux hands out the 8 KB of tile state only to processes that ask (arch_prctl).
bool ask_for_tiles() {
#if defined(__linux__)
  constexpr long kReqXcompPerm = 0x1023, kXtileData = 18;
  return syscall(SYS_arch_prctl, kReqXcompPerm, kXtileData) == 0;
#else
  return false;
#endif
}

std::vector<Isa> detect() {
  std::vector<Isa> found{Isa::generic};
  std::uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool fma = bit(c, 12), osxsave = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
  if (!osxsave || !avx) return found;
  const std::uint64_t os = xgetbv();
  if ((os & 0x6) != 0x6) return found;  // xmm and ymm state
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  if (!(bit(b, 5) && fma && f16c && bit(b, 3) && bit(b, 8))) return found;  // avx2, bmi1, bmi2
  found.push_back(Isa::avx2);
  const bool f = bit(b, 16), dq = bit(b, 17), cd = bit(b, 28), bw = bit(b, 30), vl = bit(b, 31);
  const bool vnni = bit(c, 11), amx_bf16 = bit(d, 22), amx_tile = bit(d, 24), amx_int8 = bit(d, 25);
  if (!((os & 0xe0) == 0xe0 && f && dq && cd && bw && vl && vnni)) return found;  // opmask, zmm state
  found.push_back(Isa::avx512);
  const bool vbmi = bit(c, 1);
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !bit(a, 5) || !vbmi) return found;
  found.push_back(Isa::avx512bf16);
  if ((os & 0x60000) == 0x60000 && amx_tile && amx_bf16 && amx_int8 && ask_for_tiles())
    found.push_back(Isa::amx);
#if CHILIAD_HAS_AMX_EMULATED
  found.push_back(Isa::amx_emulated);
#endif
  return found;
}

#else

std::vector<Isa> detect() { return {Isa::generic}; }

#endif

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> found = detect();
  return found;
}

Isa choose_isa(const std::string& name) {
  const std::vector<Isa>& available = available_isas();
  if (name == "auto") return available.back() == Isa::amx_emulated ? available.end()[-2] : available.back();
  std::string have;
  for (Isa isa : available) {
    if (name == isa_name(isa)) return isa;
    have += std::string(have.empty() ? "" : ", ") + isa_name(isa);
  }
  for (const char* known : kNames)
    if (name == known)
      throw std::invalid_argument("this machine cannot run isa '" + name + "'; it has " + have);
  throw std::invalid_argument("unknown isa '" + name + "': use auto, " + have);
}

}  // namespace chiliad
