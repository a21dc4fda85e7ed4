// What the kernels ask of the hardware beyond plain C++.
// tests/native/emulation has a file of this name that does the same on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace adakernels {

// kCount values that are loaded and stored by one access.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T values[kCount];
};

template <int kCount, typename T>
__device__ __forceinline__ Vector<T, kCount> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, kCount>*>(from);
}

template <typename T, int kCount>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, kCount>& vector) {
  *reinterpret_cast<Vector<T, kCount>*>(to) = vector;
}

// Begins to copy 16 or 4 bytes to shared memory, or to fill those with zeros, past the registers.
template <int kBytes = 16>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  static_assert(kBytes == 16 || kBytes == 4);
  const uint32_t address = uint32_t(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(inside ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(global), "r"(inside ? 4 : 0)
                 : "memory");
}

// The thread's copies since the last call become a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the last kLeft groups of the thread's own copies.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Of kCount 8x8 matrices of 16-bit numbers in shared memory, two neighbours of row lane / 4 of each, from column
// 2 * (lane % 4) on. Lane i gives where row i % 8 of matrix i / 8 is. With kTransposed those of the matrices'
// transposes. A 32-bit number passes for two of 16 bits.
template <bool kTransposed = false, int kCount>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[kCount], const void* row) {
  static_assert(kCount == 2 || kCount == 4);
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  if constexpr (kCount == 4 && kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else if constexpr (kCount == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
}

// The number with the precision of TF32, rounded to nearest.
__device__ __forceinline__ uint32_t to_tf32(uint32_t number) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(number)));
  return rounded;
}

// sums += a b with a [16, 16] in rows and b [16, 8] in columns, of float16 or bfloat16, spread over a warp as by
// load_matrices; sums are of rows lane / 4 and lane / 4 + 8 and of columns 2 * (lane % 4) and the one after.
// Of float a is [16, 8] and b [8, 8], multiplied as TF32.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, c10::Half> || std::is_same_v<T, c10::BFloat16> || std::is_same_v<T, float>);
  if constexpr (std::is_same_v<T, c10::Half>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else if constexpr (std::is_same_v<T, c10::BFloat16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(to_tf32(a[0])), "r"(to_tf32(a[1])), "r"(to_tf32(a[2])), "r"(to_tf32(a[3])),
                   "r"(to_tf32(b[0])), "r"(to_tf32(b[1])));
}

// Products of a warpgroup, four warps of which all threads have to call these together. They read shared memory
// themselves, while the threads go on.

// Whether the device that this code is compiled for has them.
__device__ __forceinline__ constexpr bool has_warpgroup_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  return true;
#else
  return false;
#endif
}

// Rows of 128 bytes in shared memory, of which the 16 bytes at place i of row r are at place i ^ r % 8, and row 0 at a
// multiple of 1024. By columns there are `block_bytes` from 64 numbers of a row to the next 64.
class Matrix {
 public:
  __device__ explicit Matrix(const void* shared, uint32_t block_bytes = 16)
      : bits_(uint64_t(uint32_t(__cvta_generic_to_shared(shared)) >> 4 & 0x3fff) | uint64_t(block_bytes >> 4) << 16 |
              uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62) {}
  __device__ uint64_t bits() const { return bits_; }

 private:
  uint64_t bits_;
};

// What the thread wrote to shared memory before is there for the products that begin after the next barrier.
__device__ __forceinline__ void fence_for_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Before the first product, and after sums have been changed by others.
__device__ __forceinline__ void begin_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// The products since the last call become a group.
__device__ __forceinline__ void commit_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits for all groups but the last kLeft.
template <int kLeft>
__device__ __forceinline__ void wait_for_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#endif
}

#define ADAKERNELS_SUMS_2(i) "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3]), \
                             "+f"(sums[i + 1][0]), "+f"(sums[i + 1][1]), "+f"(sums[i + 1][2]), "+f"(sums[i + 1][3])
#define ADAKERNELS_SUMS_4(i) ADAKERNELS_SUMS_2(i), ADAKERNELS_SUMS_2(i + 2)
#define ADAKERNELS_NAMES_16 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define ADAKERNELS_NAMES_32 \
  ADAKERNELS_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ADAKERNELS_NAMES_64 \
  ADAKERNELS_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
                      ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ADAKERNELS_PRODUCT_32(types, rest)                                                                          \
  asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n32" types                       \
               " {" ADAKERNELS_NAMES_16 "}, %16, %17, p, 1, 1" rest ";}"                                             \
               : ADAKERNELS_SUMS_4(0)                                                                               \
               : "l"(a.bits()), "l"(b.bits()), "n"(int(kByColumns)))
#define ADAKERNELS_PRODUCT_64(types, rest)                                                                          \
  asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64" types                       \
               " {" ADAKERNELS_NAMES_32 "}, %32, %33, p, 1, 1" rest ";}"                                             \
               : ADAKERNELS_SUMS_4(0), ADAKERNELS_SUMS_4(4)                                                         \
               : "l"(a.bits()), "l"(b.bits()), "n"(int(kByColumns)))
#define ADAKERNELS_PRODUCT_128(types, rest)                                                                         \
  asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n128" types                      \
               " {" ADAKERNELS_NAMES_64 "}, %64, %65, p, 1, 1" rest ";}"                                             \
               : ADAKERNELS_SUMS_4(0), ADAKERNELS_SUMS_4(4), ADAKERNELS_SUMS_4(8), ADAKERNELS_SUMS_4(12)            \
               : "l"(a.bits()), "l"(b.bits()), "n"(int(kByColumns)))

// Begins sums += a b, a [64, 16] of which the four warps have 16 rows each, b [16, kColumns], with the sums of a
// warp spread as by multiply_add, 8 columns after the other. b has a row for a column, with kByColumns for a k. Of
// float a has 8 columns, b is not by columns, and both are cut to TF32.
template <typename T, bool kByColumns, int kColumns, int kSums>
__device__ __forceinline__ void multiply_add_warpgroup(float (&sums)[kSums][4], const Matrix& a, const Matrix& b) {
  static_assert((kColumns == 32 || kColumns == 64 || kColumns == 128) && kColumns <= 8 * kSums);
  static_assert(!(kByColumns && std::is_same_v<T, float>));
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (std::is_same_v<T, c10::Half> && kColumns == 32)
    ADAKERNELS_PRODUCT_32("k16.f32.f16.f16", ", 0, %18");
  else if constexpr (std::is_same_v<T, c10::Half> && kColumns == 64)
    ADAKERNELS_PRODUCT_64("k16.f32.f16.f16", ", 0, %34");
  else if constexpr (std::is_same_v<T, c10::Half>)
    ADAKERNELS_PRODUCT_128("k16.f32.f16.f16", ", 0, %66");
  else if constexpr (std::is_same_v<T, c10::BFloat16> && kColumns == 32)
    ADAKERNELS_PRODUCT_32("k16.f32.bf16.bf16", ", 0, %18");
  else if constexpr (std::is_same_v<T, c10::BFloat16> && kColumns == 64)
    ADAKERNELS_PRODUCT_64("k16.f32.bf16.bf16", ", 0, %34");
  else if constexpr (std::is_same_v<T, c10::BFloat16>)
    ADAKERNELS_PRODUCT_128("k16.f32.bf16.bf16", ", 0, %66");
  else if constexpr (kColumns == 32)
    ADAKERNELS_PRODUCT_32("k8.f32.tf32.tf32", "");
  else if constexpr (kColumns == 64)
    ADAKERNELS_PRODUCT_64("k8.f32.tf32.tf32", "");
  else
    ADAKERNELS_PRODUCT_128("k8.f32.tf32.tf32", "");
#endif
}

#undef ADAKERNELS_PRODUCT_128
#undef ADAKERNELS_PRODUCT_64
#undef ADAKERNELS_PRODUCT_32
#undef ADAKERNELS_NAMES_64
#undef ADAKERNELS_NAMES_32
#undef ADAKERNELS_NAMES_16
#undef ADAKERNELS_SUMS_4
#undef ADAKERNELS_SUMS_2

// The dynamic shared memory of the block.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

}  // namespace adakernels
