#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace chiliad {

void Freed::operator()(void* p) const { std::free(p); }

Bytes allocate(std::size_t bytes) {
  constexpr std::size_t kHuge = std::size_t{2} << 20;
  const std::size_t alignment = bytes >= kHuge ? kHuge : 64;
  const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* p = std::aligned_alloc(alignment, rounded ? rounded : alignment);
  if (p == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (alignment == kHuge) madvise(p, rounded, MADV_HUGEPAGE);
#endif
  std::memset(p, 0, rounded ? rounded : alignment);
  return Bytes(static_cast<std::byte*>(p));
}

std::byte* Kernels::scratch(int index, std::size_t bytes) {
  if (bytes > scratch_bytes_[index]) {
    scratch_[index] = allocate(bytes + bytes / 4);
    scratch_bytes_[index] = bytes + bytes / 4;
  }
  return scratch_[index].get();
}

}  // namespace chiliad
