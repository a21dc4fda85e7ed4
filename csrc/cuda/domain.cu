// The lists of a domain, built on the device: nothing of a policy comes to the host.
#include "cuda/domain.cuh"

#include <algorithm>
#include <tuple>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace adakernels {

namespace {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kMostThreads = 1024;

// One of the two lists, and the policy that it follows.
struct List {
  int32_t* channels;      // [N, C] | null
  int32_t* count;         // [N]
  const int64_t* policy;  // [N, C]
  uint32_t size;          // C
  bool inputs;
};

// A block has one list of one row: it takes as many channels at a time as it has threads.
__global__ void __launch_bounds__(kMostThreads) domain_kernel(List first, List second, uint32_t lists, int64_t frames) {
  const List list = blockIdx.x % lists == 0 ? first : second;
  const int64_t row = blockIdx.x / lists;
  int32_t* to = list.channels + row * list.size;
  // Of each warp, how many of its channels are chosen.
  uint32_t* chosen_of_warp = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  uint32_t before = 0;
  for (uint32_t start = 0; start < list.size; start += blockDim.x) {
    const uint32_t channel = start + threadIdx.x;
    const bool inside = channel < list.size;
    const bool chosen = inside && (list.inputs ? is_live(list.policy, row, list.size, channel)
                                               : is_needed(list.policy, row, frames, list.size, channel));
    const uint32_t votes = __ballot_sync(~0u, chosen);
    if (lane == 0) chosen_of_warp[warp] = uint32_t(__popc(votes));
    __syncthreads();
    // Lane i looks at warp i.
    const uint32_t others = lane < warps ? chosen_of_warp[lane] : 0;
    const uint32_t place =
        before + __reduce_add_sync(~0u, lane < warp ? others : 0u) + uint32_t(__popc(votes & ((1u << lane) - 1)));
    before += __reduce_add_sync(~0u, others);
    // The others are filled in from the end.
    if (inside) to[chosen ? place : list.size - 1 - (channel - place)] = int32_t(channel);
    __syncthreads();
  }
  if (threadIdx.x == 0) list.count[row] = int32_t(before);
}

// The lists as an operator of their own, empty where everything is visited.
std::tuple<Tensor, Tensor, Tensor, Tensor> domain_lists(std::optional<Tensor> policy,     // [N, C_out]
                                                        std::optional<Tensor> in_policy,  // [N, C_in]
                                                        int64_t frames) {
  STD_TORCH_CHECK(policy || in_policy, "domain: expected a policy");
  const DomainLists lists = build_domain(policy, in_policy, frames);
  const auto or_empty = [&](const std::optional<Tensor>& tensor) {
    return tensor ? *tensor : torch::stable::new_empty(policy ? *policy : *in_policy, {0}, ScalarType::Int);
  };
  return {or_empty(lists.outputs), or_empty(lists.output_count), or_empty(lists.inputs), or_empty(lists.input_count)};
}

}  // namespace

Domain DomainLists::domain() const {
  return {data_or_null<int32_t>(outputs), data_or_null<int32_t>(output_count), data_or_null<int32_t>(inputs),
          data_or_null<int32_t>(input_count)};
}

DomainLists build_domain(const std::optional<Tensor>& policy,     // [N, C_out]
                         const std::optional<Tensor>& in_policy,  // [N, C_in]
                         int64_t frames) {
  DomainLists lists;
  List kernel_lists[2] = {};
  uint32_t count = 0, most = 1;
  const auto add = [&](const std::optional<Tensor>& values, std::optional<Tensor>& channels,
                       std::optional<Tensor>& counts, bool inputs) {
    if (!values) return;
    STD_TORCH_CHECK(values->dim() == 2 && values->is_contiguous() && values->scalar_type() == ScalarType::Long,
                    "gated_conv2d: expected contiguous int64 policies [N, C]");
    channels = torch::stable::new_empty(*values, {values->size(0), values->size(1)}, ScalarType::Int);
    counts = torch::stable::new_empty(*values, {values->size(0)}, ScalarType::Int);
    kernel_lists[count++] = {mutable_data<int32_t>(*channels), mutable_data<int32_t>(*counts), data<int64_t>(*values),
                             uint32_t(values->size(1)), inputs};
    most = std::max(most, uint32_t(values->size(1)));
  };
  add(policy, lists.outputs, lists.output_count, false);
  add(in_policy, lists.inputs, lists.input_count, true);
  if (count == 0) return lists;
  const Tensor& any = policy ? *policy : *in_policy;
  const uint32_t threads = std::min(kMostThreads, (most + kWarp - 1) / kWarp * kWarp);
  Stream(any).launch(&domain_kernel, any.size(0) * count, int(threads), int(kMostThreads / kWarp * sizeof(uint32_t)),
                     kernel_lists[0], kernel_lists[1], count, frames);
  return lists;
}

STABLE_TORCH_LIBRARY_FRAGMENT(adakernels_cuda, m) {
  m.def("domain(Tensor? policy, Tensor? in_policy, int frames) -> (Tensor, Tensor, Tensor, Tensor)");
}

ADAKERNELS_CUDA_OPERATORS(m) { m.impl("domain", TORCH_BOX(&domain_lists)); }

}  // namespace adakernels
