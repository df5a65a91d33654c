// Both operators in one kernel, one launch.
//
// Warps read rows (row_sums.cuh), up to 32 tokens at a time; then each lane turns the sums of one
// token into its metrics, and the first lanes fold these into the warp's running state. The blocks'
// states are joined by the block that finishes last, always in the order of the tokens, whichever
// block that is: the result is bitwise the same in every run.
//
// Bytes moved per token: 2 * hidden_size * element size read; kNumMetrics values written where the
// per-token results are wanted. Partial states: 208 bytes for each of at most 512 blocks.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "devices.h"
#include "layer_metrics.h"
#include "partial_state.cuh"
#include "row_sums.cuh"
#include "runtime.h"

namespace simdiff::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
// Half of the 2048 threads that a multiprocessor holds: 64 registers each.
constexpr int kBlocksPerMultiprocessor = 4;
// One wave on an H100 (132 multiprocessors), and few enough that the last block joins their states
// in about 2 us (predicted: 106 KB out of L2, two rounds of loads).
constexpr int kMaxBlocks = 512;
constexpr int kTile = kLanes;        // tokens measured together: one lane each
constexpr int kColumns = kTile + 1;  // lanes that read one column each hit different banks
constexpr int kJoiners = kThreads / kStateLanes;

struct Arguments {
  const void* before;
  const void* after;
  const bool* mask;
  void* per_token;
  double* moments;
  int64_t* tallies;
  PartialState* partials;
  unsigned* num_finished;
  int64_t before_outer_stride;
  int64_t before_inner_stride;
  int64_t after_outer_stride;
  int64_t after_inner_stride;
  int64_t num_tokens;
  int64_t inner;
  int64_t tokens_per_group;
  int hidden_size;
};

// Row sums first, then, in the same columns, the metrics of the same tokens.
using WarpTile = double[kNumMetrics][kColumns];

// Where the rows of a tile start, in entries.
struct RowStarts {
  int64_t before[kTile];
  int64_t after[kTile];
};

struct SharedMemory {
  WarpTile tiles[kWarps];
  RowStarts row_starts[kWarps];
  PartialState states[kJoiners];
  bool is_last;
};

template <int kWarpsPerRow>
__device__ void synchronize_group() {
  if constexpr (kWarpsPerRow == 1) {
    __syncwarp();
  } else {
    static_assert(kWarpsPerRow == kWarps);
    __syncthreads();
  }
}

template <class Value>
__device__ void store_token(void* out, int64_t num_tokens, int64_t token,
                            const TokenMetrics& metrics) {
#pragma unroll
  for (int m = 0; m < kNumMetrics; ++m) {
    static_cast<Value*>(out)[m * num_tokens + token] = static_cast<Value>(metrics.values[m]);
  }
}

__device__ void find_rows(const Arguments& args, int64_t token, int lane, RowStarts& starts) {
  const int64_t outer = token / args.inner, inner = token - outer * args.inner;
  starts.before[lane] = outer * args.before_outer_stride + inner * args.before_inner_stride;
  starts.after[lane] = outer * args.after_outer_stride + inner * args.after_inner_stride;
}

// Turns the sums in this lane's column into metrics, in place; returns whether they are finite.
template <class T, int kWarpsPerRow>
__device__ bool measure_token(const Arguments& args, WarpTile* tiles, int64_t token, int lane) {
  double sums[4] = {};
#pragma unroll
  for (int warp = 0; warp < kWarpsPerRow; ++warp) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += tiles[warp][i][lane];
  }
  const RowSums row{sums[0], sums[1], sums[2], sums[3]};
  const TokenMetrics metrics = token_metrics(row, args.hidden_size);
#pragma unroll
  for (int m = 0; m < kNumMetrics; ++m) tiles[0][m][lane] = metrics.values[m];
  if (args.per_token != nullptr) {
    using Value = std::conditional_t<std::is_same_v<T, double>, double, float>;
    store_token<Value>(args.per_token, args.num_tokens, token, metrics);
  }
  return is_finite(row);
}

// Folds the metrics of the tokens in `used` (a bit each), the first being `first_token`.
__device__ void fold_tile(PartialState& state, const WarpTile& tile, unsigned used,
                          unsigned nonfinite, int64_t first_token, int lane) {
  if (lane < kNumMetrics) {
    MetricState metric = state.metrics[lane];
    for (unsigned left = used; left; left &= left - 1) {
      const int column = __ffs(left) - 1;
      metric.add(tile[lane][column], first_token + column);
    }
    state.metrics[lane] = metric;
  } else if (lane == kNumMetrics) {
    state.counts.num_tokens += __popc(used);
    state.counts.num_nonfinite += __popc(nonfinite);
  }
}

// Measures the tokens [begin, end) of a group of warps, and folds them into `state`.
template <class T, int kWarpsPerRow>
__device__ void measure_tokens(const Arguments& args, int64_t begin, int64_t end,
                               WarpTile* group_tiles, RowStarts& starts, PartialState& state,
                               int warp_in_group, int lane) {
  WarpTile& own = group_tiles[warp_in_group];
  for (int64_t first = begin; first < end; first += kTile) {
    const unsigned existing =
        end - first >= kTile ? kAllLanes : (1u << static_cast<int>(end - first)) - 1;
    unsigned counted = existing;
    if (args.mask != nullptr) {
      counted = __ballot_sync(kAllLanes, first + lane < end && args.mask[first + lane]);
    }
    // Padding is read only where its metrics are stored.
    const unsigned wanted = args.per_token != nullptr ? existing : counted;
    find_rows(args, first + lane, lane, starts);
    __syncwarp();
    for (unsigned left = wanted; left; left &= left - 1) {
      const int column = __ffs(left) - 1;
      const RowSums sums = row_sums<T, kWarpsPerRow * kLanes>(
          static_cast<const T*>(args.before) + starts.before[column],
          static_cast<const T*>(args.after) + starts.after[column], args.hidden_size,
          warp_in_group * kLanes + lane);
      const double sum = warp_sums(sums, lane);
      if (lane % 8 == 0) own[lane / 8][column] = sum;
    }
    synchronize_group<kWarpsPerRow>();
    if (warp_in_group == 0) {
      bool finite = false;
      if (wanted >> lane & 1) {
        finite = measure_token<T, kWarpsPerRow>(args, group_tiles, first + lane, lane);
      }
      const unsigned used = __ballot_sync(kAllLanes, finite) & counted;
      fold_tile(state, own, used, counted & ~used, first, lane);
    }
    synchronize_group<kWarpsPerRow>();
  }
}

// Joins the running state with what this update saw; one lane of kStateLanes each.
__device__ void add_to_running_state(const Arguments& args, const PartialState& seen, int lane) {
  const int64_t num_seen = args.tallies[kNumMetrics + 2];
  __syncwarp();
  if (lane < kNumMetrics) {
    const MetricState& metric = seen.metrics[lane];
    args.moments[lane] += metric.sum;
    args.moments[kNumMetrics + lane] += metric.sum_of_squares;
    if (metric.maximum > args.moments[2 * kNumMetrics + lane]) {
      args.moments[2 * kNumMetrics + lane] = metric.maximum;
      args.tallies[lane] = num_seen + metric.argmax;
    }
  } else if (lane == kNumMetrics) {
    args.tallies[kNumMetrics] += seen.counts.num_tokens;
    args.tallies[kNumMetrics + 1] += seen.counts.num_nonfinite;
    args.tallies[kNumMetrics + 2] = num_seen + args.num_tokens;
  }
}

// Leaves the state of this block in states[0].
__device__ void join_block(SharedMemory& shared, int num_states) {
  const auto from_shared = [](const auto* state) { return *state; };
  PartialState& target = shared.states[0];
  __syncthreads();
  if (threadIdx.x < kStateLanes) {
    join_partials(0, num_states, threadIdx.x, target, shared.states, from_shared);
  }
}

// Whether this block is the last to arrive here, everybody's partial state then being visible.
__device__ bool is_last_block(const Arguments& args, SharedMemory& shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.is_last = atomicAdd(args.num_finished, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return shared.is_last;
}

// Joins the states of all blocks in two steps, in the order of the tokens.
__device__ void join_grid(const Arguments& args, SharedMemory& shared) {
  const int joiner = threadIdx.x / kStateLanes, num_blocks = gridDim.x;
  const int share = (num_blocks + kJoiners - 1) / kJoiners;
  const auto from_memory = [](const auto* state) { return load_state(state); };
  join_partials(min(num_blocks, joiner * share), min(num_blocks, (joiner + 1) * share),
                threadIdx.x % kStateLanes, shared.states[joiner], args.partials, from_memory);
  if (threadIdx.x == 0) *args.num_finished = 0;
  join_block(shared, kJoiners);
}

template <class T, int kWarpsPerRow>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    layer_metrics_kernel(const __grid_constant__ Arguments args) {
  __shared__ SharedMemory shared;
  constexpr int kGroups = kWarps / kWarpsPerRow;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int group = warp / kWarpsPerRow;
  PartialState& state = shared.states[group];
  if (warp % kWarpsPerRow == 0) {
    if (lane < kNumMetrics) state.metrics[lane] = MetricState::empty();
    if (lane == kNumMetrics) state.counts = Counts::empty();
    __syncwarp();
  }

  const int64_t begin =
      (static_cast<int64_t>(blockIdx.x) * kGroups + group) * args.tokens_per_group;
  const int64_t end = min(args.num_tokens, begin + args.tokens_per_group);
  measure_tokens<T, kWarpsPerRow>(args, begin, end, shared.tiles + group * kWarpsPerRow,
                                  shared.row_starts[warp], state, warp % kWarpsPerRow, lane);
  if (args.moments == nullptr) return;

  join_block(shared, kGroups);
  if (gridDim.x > 1) {
    if (threadIdx.x < kNumMetrics) {
      args.partials[blockIdx.x].metrics[threadIdx.x] = shared.states[0].metrics[threadIdx.x];
    } else if (threadIdx.x == kNumMetrics) {
      args.partials[blockIdx.x].counts = shared.states[0].counts;
    }
    if (!is_last_block(args, shared)) return;
    join_grid(args, shared);
  }
  if (threadIdx.x < kLanes) add_to_running_state(args, shared.states[0], threadIdx.x);
}

template <class T>
void launch_as(const Arguments& args, const LaunchShape& shape, Stream stream) {
  const auto kernel =
      shape.warps_per_row == 1 ? layer_metrics_kernel<T, 1> : layer_metrics_kernel<T, kWarps>;
  kernel<<<shape.blocks, shape.threads, 0, stream>>>(args);
  check(cudaGetLastError(), "launch of layer_metrics_kernel");
}

void launch(Arguments args, const LayerStates& states, int device, Stream stream) {
  if (states.num_tokens() == 0) return;
  check_hidden_size(states.hidden_size);
  const LaunchShape shape = launch_shape(states.num_tokens(), states.hidden_size, states.dtype);
  args.before = states.before.data;
  args.after = states.after.data;
  args.before_outer_stride = states.before.outer_stride;
  args.before_inner_stride = states.before.inner_stride;
  args.after_outer_stride = states.after.outer_stride;
  args.after_inner_stride = states.after.inner_stride;
  args.num_tokens = states.num_tokens();
  args.inner = states.inner;
  args.tokens_per_group = shape.tokens_per_group;
  args.hidden_size = static_cast<int>(states.hidden_size);
  const CurrentDevice current(device);
  switch (states.dtype) {
    case DType::kFloat32:
      return launch_as<float>(args, shape, stream);
    case DType::kFloat64:
      return launch_as<double>(args, shape, stream);
    case DType::kBFloat16:
      return launch_as<BFloat16>(args, shape, stream);
    case DType::kFloat16:
      return launch_as<__half>(args, shape, stream);
  }
}

}  // namespace

const int64_t kScratchWords = kMaxBlocks * static_cast<int64_t>(sizeof(PartialState) / 8) + 1;

LaunchShape launch_shape(int64_t num_tokens, int64_t hidden_size, DType dtype) {
  // With fewer tokens than this, one warp for each leaves most of the memory system idle; rows of
  // one round of loads of a warp (2 KB) gain nothing from more warps.
  constexpr int64_t kManyTokens = 1024;
  const int64_t row_bytes = hidden_size * kElementBytes[static_cast<int>(dtype)];
  const bool shared_rows = num_tokens < kManyTokens && row_bytes > 16 * kLanes * kUnroll<kLanes>;
  const int64_t groups_per_block = shared_rows ? 1 : kWarps;
  const int64_t tokens_per_group = ceil_div(num_tokens, kMaxBlocks * groups_per_block);
  const int64_t blocks = ceil_div(num_tokens, tokens_per_group * groups_per_block);
  return {static_cast<int>(blocks), kThreads, shared_rows ? kWarps : 1, tokens_per_group};
}

void token_metrics(const LayerStates& states, PerToken out, int device, Stream stream) {
  Arguments args{};
  args.per_token = out;
  launch(args, states, device, stream);
}

void accumulate(const LayerStates& states, const bool* mask, double* moments, int64_t* tallies,
                int64_t* scratch, PerToken out, int device, Stream stream) {
  Arguments args{};
  args.mask = mask;
  args.per_token = out;
  args.moments = moments;
  args.tallies = tallies;
  args.partials = reinterpret_cast<PartialState*>(scratch);
  args.num_finished = reinterpret_cast<unsigned*>(scratch + kScratchWords - 1);
  launch(args, states, device, stream);
}

std::vector<int> compiled_architectures() {
  std::vector<int> architectures = {__CUDA_ARCH_LIST__};  // 800, 900, ...
  for (int& architecture : architectures) architecture /= 10;
  return architectures;
}

int runtime_version() { return CUDART_VERSION; }

std::string device_problem(int device) {
  try {
    const CurrentDevice current(device);
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, layer_metrics_kernel<float, 1>), "no kernel to run");
  } catch (const std::runtime_error& error) {
    cudaGetLastError();  // the next call must not report it again
    return error.what();
  }
  return "";
}

}  // namespace simdiff::cuda
