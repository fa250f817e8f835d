// What the environment decides about the CPU side, read at each call: getenv costs less than a
// page.
#pragma once

#include <cstdlib>
#include <string>
#include <thread>

#include "cpu/block_kernels.h"
#include "validate.h"

namespace minicpm41::cpu {

struct Settings {
  int num_threads = 1;
  const BlockKernels* kernels = nullptr;
};

inline const BlockKernels* best_block_kernels() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (block_kernels_avx512() != nullptr && __builtin_cpu_supports("avx512f")) {
    return block_kernels_avx512();
  }
  if (block_kernels_avx2() != nullptr && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma")) {
    return block_kernels_avx2();
  }
#endif
  return block_kernels_baseline();
}

// FD_MINICPM41_CPU_THREADS: threads an op may use, else one for each core this process may run on.
// FD_MINICPM41_CPU_ISA: baseline, avx2 or avx512, at most what the machine has; for tests.
inline Status read_settings(const char* op, Settings& settings) {
  Check check(op);
  settings.num_threads = std::max(1u, std::thread::hardware_concurrency());
  if (const char* text = std::getenv("FD_MINICPM41_CPU_THREADS")) {
    char* end = nullptr;
    const long threads = std::strtol(text, &end, 10);
    check.require(end != text && *end == '\0' && threads >= 1 && threads <= 1024,
                  "FD_MINICPM41_CPU_THREADS", text, "a number of threads from 1 to 1024");
    if (check.ok()) settings.num_threads = static_cast<int>(threads);
  }
  const BlockKernels* best = best_block_kernels();
  settings.kernels = best;
  if (const char* text = std::getenv("FD_MINICPM41_CPU_ISA")) {
    const std::string wanted = text;
    std::string known;
    bool found = false;
    for (const BlockKernels* kernels :
         {block_kernels_baseline(), block_kernels_avx2(), block_kernels_avx512()}) {
      if (found || kernels == nullptr) continue;
      known += (known.empty() ? "" : ", ") + std::string(kernels->name);
      if (wanted == kernels->name) {
        settings.kernels = kernels;
        found = true;
      }
      if (kernels == best) break;
    }
    check.require(found, "FD_MINICPM41_CPU_ISA", text, "one of " + known);
  }
  return check.status();
}

}  // namespace minicpm41::cpu
