// Native memories: a plain C interface over one set of kernels, compiled once per instruction set.
//
// Every tensor is contiguous, [b, t, h, ·] or [b, h, k, v]. No headers of Python or PyTorch: Python passes addresses.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "pool.h"

#define INLINE inline __attribute__((always_inline))
#define OUTLINE __attribute__((noinline))
// The narrowest vectors for which slices of several vectors are compiled. x86 without AVX2 is rare, and so is float64, and
// every slice width takes time to compile.
#if defined(__x86_64__)
#define USUAL_BYTES 32
#else
#define USUAL_BYTES 16
#endif
#if defined(__x86_64__)
#define IN_REGISTER(x) asm("" : "+v"(x))
#else
#define IN_REGISTER(x) asm("" : "+w"(x))
#endif
#define UNROLL _Pragma("GCC unroll 16")

namespace {

// bfloat16: the upper half of a float32.
struct Bfloat16 {
  uint16_t bits;
  Bfloat16() = default;
  explicit Bfloat16(float x) : bits(rounded(x)) {}
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    __builtin_memcpy(&x, &wide, sizeof x);
    return x;
  }

 private:
  static uint16_t rounded(float x) {  // to the nearest, ties to even
    uint32_t wide;
    __builtin_memcpy(&wide, &x, sizeof wide);
    return x == x ? uint16_t((wide + 0x7FFF + (wide >> 16 & 1)) >> 16) : uint16_t(0x7FC0);
  }
};

// All kernels of operations have one signature: sizes, a scale, and the addresses of tensors (null if absent).
using Kernel = void(int threads, const int64_t* sizes, double scale, void* const* tensors);

// The job that Python packs for one token: sizes, factors and addresses in the order of OneToken's members (step.h).
struct OneTokenJob {
  int64_t sizes[18];
  double factors[2];
  int64_t rows, rows_after;
  void* tensors[];  // 27, or 37 if entries are kept beyond the window
};

struct Kernels {
  template <class Function>
  struct Types {
    Function *f32, *f64;
  };
  Types<Kernel> delta_rule_forward, delta_rule_backward, fast_weights_forward, fast_weights_backward, linear_attention_forward, linear_attention_backward,
      window_attention_forward, window_attention_backward, expiry_forward, unit_silu_forward, unit_silu_backward, rotate_forward,
      rms_norm_forward, rms_norm_backward, mix_forward, mix_backward;
  void (*one_token[3])(int threads, const OneTokenJob&);  // in float32, float64 and bfloat16
};

// Returns the beginning of the next ones.
template <class... Pointers>
void* const* from(void* const* addresses, Pointers*&... tensors) {
  ((tensors = static_cast<Pointers*>(*addresses++)), ...);
  return addresses;
}

#define ISA plain
#define LANE_BYTES 16
#include "kernels.h"
#undef ISA
#undef LANE_BYTES

// GCC and clang have different pragmas that allow all following functions to use more instructions.
#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BEGIN_TARGET(isa) PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(isa) PRAGMA(GCC push_options) PRAGMA(GCC target(isa))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

#if defined(__x86_64__)
BEGIN_TARGET("avx2,fma")
#define ISA avx2
#define LANE_BYTES 32
#include "kernels.h"
#undef ISA
#undef LANE_BYTES
END_TARGET

BEGIN_TARGET("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define ISA avx512
#define LANE_BYTES 64
#include "kernels.h"
#undef ISA
#undef LANE_BYTES
END_TARGET
#endif

const Kernels* best() {
  const char* forced = std::getenv("HQLT_NATIVE_ISA");
  const std::string name = forced ? forced : "";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (name == "avx512" || name == "")) return &avx512::kernels;
  if (has_avx2 && (name == "avx2" || name == "")) return &avx2::kernels;
#endif
  return name == "" || name == "plain" ? &plain::kernels : nullptr;
}

const Kernels* const kernels = best();

}  // namespace

// The error of a call: what was expected, or "memory"; null on success.
template <class Call>
const char* guarded(const Call& call) {
  try {
    call();
    return nullptr;
  } catch (const std::invalid_argument& refusal) {
    static thread_local std::string text;
    text = refusal.what();
    return text.c_str();
  } catch (...) {  // std::bad_alloc, or a thread could not be created
    return "memory";
  }
}

#define EXPORT(kernel)                                                                                             \
  extern "C" __attribute__((visibility("default"))) const char* hqlt_##kernel(                                     \
      int is_double, int threads, const int64_t* sizes, double scale, void* const* tensors) {                      \
    return guarded([&] { (is_double ? kernels->kernel.f64 : kernels->kernel.f32)(threads, sizes, scale, tensors); }); \
  }

EXPORT(delta_rule_forward)
EXPORT(delta_rule_backward)
EXPORT(fast_weights_forward)
EXPORT(fast_weights_backward)
EXPORT(linear_attention_forward)
EXPORT(linear_attention_backward)
EXPORT(window_attention_forward)
EXPORT(window_attention_backward)
EXPORT(expiry_forward)
EXPORT(unit_silu_forward)
EXPORT(unit_silu_backward)
EXPORT(rotate_forward)
EXPORT(rms_norm_forward)
EXPORT(rms_norm_backward)
EXPORT(mix_forward)
EXPORT(mix_backward)

extern "C" __attribute__((visibility("default"))) const char* hqlt_one_token(int dtype, int threads, const OneTokenJob* job) {
  return guarded([&] { kernels->one_token[dtype](threads, *job); });
}

// The instruction set in use: "plain", "avx2" or "avx512"; "" if HQLT_NATIVE_ISA names one that this machine lacks.
extern "C" __attribute__((visibility("default"))) const char* hqlt_instruction_set() {
  if (kernels == &plain::kernels) return "plain";
#if defined(__x86_64__)
  if (kernels == &avx2::kernels) return "avx2";
  if (kernels == &avx512::kernels) return "avx512";
#endif
  return "";
}

// Digest of the sources, defined by setup.py; "" if it is not defined.
#ifndef HQLT_SOURCES
#define HQLT_SOURCES ""
#endif
extern "C" __attribute__((visibility("default"))) const char* hqlt_sources() { return HQLT_SOURCES; }

// Sets PyTorch's GOMP_parallel, so that calls run on its threads.
extern "C" __attribute__((visibility("default"))) void hqlt_use_openmp(Pool::Parallel* parallel) { Pool::openmp = parallel; }

// setuptools builds this file as an extension module, for which some linkers expect an entry point.
extern "C" __attribute__((visibility("default"))) void* PyInit__memories() { return nullptr; }
