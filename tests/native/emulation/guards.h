// Memory of tensors between guards, so that a kernel that leaves its buffers is found.
#pragma once

#include <string>

namespace emulation {

// Throws std::runtime_error if what lies directly before or behind a guarded buffer was written to.
void check_guards();

// Where an address that cannot be accessed is, in words.
std::string describe(const void* address);

}  // namespace emulation
