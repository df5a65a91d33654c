// Torch's own thread pool, for files that include no header of torch.
#pragma once

#include <cstdint>
#include <functional>

namespace simdiff {

// Calls `body` with ranges that cover 0 ... count - 1: torch.set_num_threads is obeyed and no
// second pool spins beside torch's.
void on_torch_threads(int64_t count, const std::function<void(int64_t, int64_t)>& body);

}  // namespace simdiff
