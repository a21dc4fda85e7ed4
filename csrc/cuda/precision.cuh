// How float32 is multiplied, which torch.set_float32_matmul_precision decides.
#pragma once

namespace adakernels {

// Exactly, not as TF32.
bool multiplies_exactly();

}  // namespace adakernels
