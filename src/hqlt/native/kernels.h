// Everything that is compiled once per instruction set. ISA is the namespace, LANE_BYTES the width of a vector.
namespace ISA {
#include "lanes.h"
#include "sweep.h"
#include "delta_rule.h"
#include "fast_weights.h"
#include "fast_weights_backward.h"
#include "linear_attention.h"
#include "expiry.h"
#include "window_attention.h"
#include "rows.h"
#include "kept.h"
#include "step.h"

const Kernels kernels = {
    {delta_rule_forward<float>, delta_rule_forward<double>},
    {delta_rule_backward<float>, delta_rule_backward<double>},
    {fast_weights_forward<float>, fast_weights_forward<double>},
    {fast_weights_backward<float>, fast_weights_backward<double>},
    {linear_attention_forward<float>, linear_attention_forward<double>},
    {linear_attention_backward<float>, linear_attention_backward<double>},
    {window_attention_forward<float>, window_attention_forward<double>},
    {window_attention_backward<float>, window_attention_backward<double>},
    {expiry_forward<float>, expiry_forward<double>},
    {unit_silu_forward<float>, unit_silu_forward<double>},
    {unit_silu_backward<float>, unit_silu_backward<double>},
    {rotate_forward<float>, rotate_forward<double>},
    {rms_norm_forward<float>, rms_norm_forward<double>},
    {rms_norm_backward<float>, rms_norm_backward<double>},
    {mix_forward<float>, mix_forward<double>},
    {mix_backward<float>, mix_backward<double>},
    {one_token<float, float>, one_token<double, double>, one_token<float, Bfloat16>},
};
}  // namespace ISA
