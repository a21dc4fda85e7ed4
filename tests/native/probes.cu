// Kernels with known faults and results, which show that the emulation finds the one and computes the other.
#include <string>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tensors.cuh"

namespace adakernels {

namespace {

constexpr int kThreads = 64;

// Every thread writes a place of shared memory and reads its neighbour's, with or without a barrier between.
__global__ void neighbour_kernel(float* to, bool barrier) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = float(threadIdx.x);
  if (barrier) __syncthreads();
  to[blockIdx.x * kThreads + threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];
}

// Threads pass two barriers with a value changed between.
__global__ void phases_kernel(float* to) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = 1.f;
  for (int distance = kThreads / 2; distance > 0; distance /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < distance) shared[threadIdx.x] += shared[threadIdx.x + distance];
  }
  __syncthreads();
  to[blockIdx.x * kThreads + threadIdx.x] = shared[0];
}

// Lane i's results of the collectives.
__global__ void collectives_kernel(float* to) {
  const int lane = int(threadIdx.x % 32);
  float sum = float(lane);
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  float result = sum;                                                          // 496
  result += __shfl_sync(~0u, float(lane), 3) == 3.f;                           // 1
  result += __shfl_down_sync(~0u, float(lane), 2, 8) == (lane % 8 < 6 ? lane + 2 : lane);
  result += __shfl_up_sync(~0u, float(lane), 2, 8) == (lane % 8 >= 2 ? lane - 2 : lane);
  result += __ballot_sync(~0u, lane % 2) == 0xaaaaaaaau;
  result += __reduce_add_sync(~0u, unsigned(lane)) == 496u;
  result += __reduce_max_sync(~0u, unsigned(lane)) == 31u;
  // Halves of the warp take different ways with masks of their own.
  if (lane < 16)
    result += __reduce_add_sync(0xffffu, 1u) == 16u;
  else
    for (int i = 0; i < 3; ++i) result += __any_sync(0xffff0000u, lane == 16 + i) / 3.f;
  to[blockIdx.x * kThreads + threadIdx.x] = result;
}

__global__ void lonely_barrier_kernel(float* to) {
  if (threadIdx.x != 5)
    __syncthreads();
  else
    __shfl_sync(~0u, 1.f, 0);
  to[threadIdx.x] = 0.f;
}

__global__ void wrong_mask_kernel(float* to) { to[threadIdx.x] = __shfl_sync(0x1u, 1.f, 0); }

__global__ void unaligned_kernel(float* to) { store_vector(to + 1, Vector<float, 4>{}); }

#ifndef __CUDACC__
// Only here threads have a fixed stack.
__attribute__((noinline)) float deep(int depth) {
  volatile float frame[256];
  frame[depth % 256] = float(depth);
  return depth == 0 ? 0.f : deep(depth - 1) + frame[depth % 256];
}

__global__ void deep_stack_kernel(float* to) { to[threadIdx.x] = deep(1000); }
#endif

__global__ void read_at_kernel(float* to, const float* from, int64_t index) { to[threadIdx.x] = from[index]; }

__global__ void write_at_kernel(float* to, int64_t index) { to[index] = 1.f; }

__global__ void unwritten_kernel(float* to) { to[threadIdx.x] = reinterpret_cast<float*>(shared_memory())[0]; }

// [16, 16] times the transpose of [8, 16], of which a warp copies the second half of the columns in a second group.
template <typename T>
__global__ void matmul_kernel(float* to,   // [16, 8]
                              const T* a,  // [16, 16]
                              const T* b,  // [8, 16]
                              bool wait) {
  T* shared = reinterpret_cast<T*>(shared_memory());  // [24, 16]
  const int lane = int(threadIdx.x);
  for (int half = 0; half < 2; ++half) {
    if (lane < 24)
      copy_async(shared + 16 * lane + 8 * half, (lane < 16 ? a + 16 * lane : b + 16 * (lane - 16)) + 8 * half, true);
    commit_copies();
  }
  if (wait)
    wait_for_copies<0>();
  else
    wait_for_copies<1>();
  __syncthreads();
  uint32_t left[4], right[2];
  load_matrices(left, shared + 16 * (lane % 16) + 8 * (lane / 16));
  load_matrices(right, shared + 16 * (16 + lane % 8) + 8 * (lane / 8 % 2));
  float sums[4] = {};
  multiply_add<T>(sums, left, right);
  for (int i = 0; i < 4; ++i) to[8 * (lane / 4 + i / 2 * 8) + 2 * (lane % 4) + i % 2] = sums[i];
}

Tensor matmul(const Tensor& a, const Tensor& b, bool wait) {
  Tensor to = torch::stable::new_empty(a, {16, 8}, ScalarType::Float);
  const Stream stream(a);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    stream.launch(&matmul_kernel<T>, 1, 32, 24 * 16 * int(sizeof(T)), mutable_data<float>(to), data<T>(a),
                  data<T>(b), wait);
  };
  a.scalar_type() == ScalarType::Half ? run(c10::Half()) : run(c10::BFloat16());
  return to;
}

// [64, 16] times the transpose of [32, 16], or times [16, 32] by columns, by a warpgroup.
template <typename T, bool kByColumns>
__global__ void warpgroup_matmul_kernel(float* to,   // [64, 32]
                                        const T* a,  // [64, 16]
                                        const T* b,  // [32, 16] | [16, 32]
                                        bool fence, bool wait) {
  unsigned char* left = shared_memory();  // rows of 128 bytes, of which each has 32 or 64
  unsigned char* right = left + 64 * 128;
  const auto put = [](unsigned char* rows, const T* from, int width, int row, int chunk) {
    store_vector(reinterpret_cast<T*>(rows + 128 * row + 16 * (chunk ^ (row % 8))),
                 load_vector<8>(from + row * width + 8 * chunk));
  };
  const int thread = int(threadIdx.x);
  put(left, a, 16, thread / 2, thread % 2);
  if (thread < 64) kByColumns ? put(right, b, 32, thread / 4, thread % 4) : put(right, b, 16, thread / 2, thread % 2);
  if (fence) fence_for_products();
  __syncthreads();
  float sums[4][4] = {};
  begin_products();
  multiply_add_warpgroup<T, kByColumns, 32>(sums, Matrix(left), Matrix(right, 8192));
  commit_products();
  if (wait) wait_for_products<0>();
  const int row = thread / 32 * 16 + thread % 32 / 4;
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 4; ++i) to[32 * (row + i / 2 * 8) + 8 * j + 2 * (thread % 4) + i % 2] = sums[j][i];
  wait_for_products<0>();
}

Tensor warpgroup_matmul(const Tensor& a, const Tensor& b, bool by_columns, bool fence, bool wait) {
  Tensor to = torch::stable::new_empty(a, {64, 32}, ScalarType::Float);
  const Stream stream(a);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    stream.launch(by_columns ? &warpgroup_matmul_kernel<T, true> : &warpgroup_matmul_kernel<T, false>, 1, 128,
                  (64 + 32) * 128, mutable_data<float>(to), data<T>(a), data<T>(b), fence, wait);
  };
  a.scalar_type() == ScalarType::Half ? run(c10::Half()) : run(c10::BFloat16());
  return to;
}

Tensor probe(const Tensor& like, std::string name) {
  Tensor to = torch::stable::new_zeros(like, {2, kThreads});
  const Stream stream(like);
  float* data = mutable_data<float>(to);
  const int bytes = kThreads * int(sizeof(float));
  if (name == "neighbour") stream.launch(&neighbour_kernel, 2, kThreads, bytes, data, true);
  if (name == "race") stream.launch(&neighbour_kernel, 2, kThreads, bytes, data, false);
  if (name == "phases") stream.launch(&phases_kernel, 2, kThreads, bytes, data);
  if (name == "collectives") stream.launch(&collectives_kernel, 2, kThreads, 0, data);
  if (name == "lonely_barrier") stream.launch(&lonely_barrier_kernel, 1, kThreads, 0, data);
  if (name == "wrong_mask") stream.launch(&wrong_mask_kernel, 1, kThreads, 0, data);
  if (name == "unaligned") stream.launch(&unaligned_kernel, 1, 1, 0, data);
#ifndef __CUDACC__
  if (name == "deep_stack") stream.launch(&deep_stack_kernel, 1, 1, 0, data);
#endif
  if (name == "unwritten") stream.launch(&unwritten_kernel, 1, kThreads, bytes, data);
  if (name == "large_block") stream.launch(&unaligned_kernel, 1, 1025, 0, data);
  if (name == "large_memory") stream.launch(&unaligned_kernel, 1, 1, 228 << 10, data);
  return to;
}

}  // namespace

// Reads or writes a number of a buffer that may not have it.
Tensor access(const Tensor& buffer, int64_t index, bool write) {
  Tensor to = torch::stable::new_empty(buffer, {1}), target = buffer;
  const Stream stream(buffer);
  if (write)
    stream.launch(&write_at_kernel, 1, 1, 0, mutable_data<float>(target), index);
  else
    stream.launch(&read_at_kernel, 1, 1, 0, mutable_data<float>(to), data<float>(buffer), index);
  return to;
}

STABLE_TORCH_LIBRARY(adakernels_probes, m) {
  m.def("access(Tensor buffer, int index, bool write) -> Tensor");
  m.def("probe(Tensor like, str name) -> Tensor");
  m.def("matmul(Tensor a, Tensor b, bool wait) -> Tensor");
  m.def("warpgroup_matmul(Tensor a, Tensor b, bool by_columns, bool fence, bool wait) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(adakernels_probes, CPU, m) {
  m.impl("probe", TORCH_BOX(&probe));
  m.impl("access", TORCH_BOX(&access));
  m.impl("matmul", TORCH_BOX(&matmul));
  m.impl("warpgroup_matmul", TORCH_BOX(&warpgroup_matmul));
}

}  // namespace adakernels
