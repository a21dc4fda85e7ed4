#include "common/cpu_features.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define ADAKERNELS_X86 1
#endif

namespace adakernels {
namespace {

#ifdef ADAKERNELS_X86

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // zeros if there is no such leaf
  return r;
}

uint64_t enabled_register_state() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

std::vector<CpuFeature> detect() {
  const auto bit = [](uint32_t word, int index) { return ((word >> index) & 1u) != 0; };
  const Registers leaf1 = cpuid(1, 0);
  const Registers leaf7 = cpuid(7, 0);
  const Registers leaf7_1 = cpuid(7, 1);

  const bool os_reports_state = bit(leaf1.ecx, 27);
  const uint64_t state = os_reports_state ? enabled_register_state() : 0;
  const auto saved = [state](uint64_t mask) { return (state & mask) == mask; };
  const bool ymm = saved(0x6);
  const bool zmm = saved(0xe6);
  const bool tiles = saved(0x60000);

  return {
      {"avx2", ymm && bit(leaf7.ebx, 5)},
      {"fma", ymm && bit(leaf1.ecx, 12)},
      {"f16c", ymm && bit(leaf1.ecx, 29)},
      {"bmi2", bit(leaf7.ebx, 8)},
      {"avx512f", zmm && bit(leaf7.ebx, 16)},
      {"avx512bw", zmm && bit(leaf7.ebx, 30)},
      {"avx512dq", zmm && bit(leaf7.ebx, 17)},
      {"avx512vl", zmm && bit(leaf7.ebx, 31)},
      {"avx512_bf16", zmm && bit(leaf7_1.eax, 5)},
      {"amx_bf16", tiles && bit(leaf7.edx, 22) && bit(leaf7.edx, 24)},
  };
}

#else

std::vector<CpuFeature> detect() { return {}; }

#endif

bool has_all(std::initializer_list<const char*> names) {
  const auto& features = cpu_features();
  return std::all_of(names.begin(), names.end(), [&](const char* name) {
    return std::any_of(features.begin(), features.end(), [&](const CpuFeature& feature) {
      return feature.present && std::strcmp(feature.name, name) == 0;
    });
  });
}

Isa isa_limit() {
  const char* value = std::getenv("ADAKERNELS_CPU_ISA");
  if (value == nullptr || *value == '\0') {
    return Isa::avx512;
  }
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (std::strcmp(value, isa_name(isa)) == 0) {
      return isa;
    }
  }
  throw std::invalid_argument(
      "ADAKERNELS_CPU_ISA must be portable, avx2 or avx512, got '" + std::string(value) + "'");
}

}  // namespace

const std::vector<CpuFeature>& cpu_features() {
  static const std::vector<CpuFeature> features = detect();
  return features;
}

Isa supported_isa() {
  if (!has_all({"avx2", "fma", "f16c", "bmi2"})) {
    return Isa::portable;
  }
  return has_all({"avx512f", "avx512bw", "avx512dq", "avx512vl"}) ? Isa::avx512 : Isa::avx2;
}

Isa best_isa() {
  static const Isa isa = std::min(supported_isa(), isa_limit());
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::portable:
      break;
  }
  return "portable";
}

}  // namespace adakernels
