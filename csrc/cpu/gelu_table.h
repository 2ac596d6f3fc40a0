// The numbers of gelu (activate.inl.h).
#pragma once

namespace dynquant {

constexpr int kTableEntries = 8;           // of what an `Isa` type's lookup takes
constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: a sum with it has no fraction

// What gelu takes from max(x, 0), a * erfc(a / sqrt 2) / 2 with a = |x|, as a polynomial in each of
// kTableEntries ranges of a * kGeluRanges: [n - 1/2, n + 1/2], by the distance from n. Row j has
// the factors of the j-th power, a minimax fit of the error in units of the result for x > 0.
constexpr float kGeluRanges = 1.40625f;
constexpr float kGeluLast = 7.4999995f;  // the largest that rounds to the last range
constexpr int kGeluPowers = 7;
alignas(32) constexpr float kGeluFactors[kGeluPowers][kTableEntries] = {
    {0.0f, 0.169605494f, 0.110195018f, 0.0350905471f, 0.0063273171f, 0.000670544687f,
     4.23285637e-05f, 1.60079821e-06f},
    {0.355555564f, 0.012938628f, -0.0916559473f, -0.0504824482f, -0.0125414096f, -0.00167965936f,
     -0.000127811902f, -5.65209848e-06f},
    {-0.201736599f, -0.117057331f, 0.000833536382f, 0.0264379196f, 0.0107528502f, 0.00193019456f,
     0.000182116491f, 9.56772965e-06f},
    {-3.01686828e-06f, 0.0461249985f, 0.0244618282f, -0.00288443873f, -0.0048713237f,
     -0.00132147828f, -0.000161318167f, -1.02591994e-05f},
    {0.0170262642f, 0.00238332665f, -0.00938107632f, -0.00312385918f, 0.000954568968f,
     0.000576143386f, 9.84685175e-05f, 7.84509029e-06f},
    {-8.16152533e-05f, -0.00412376784f, 1.42850638e-07f, 0.00147458992f, 0.000182211239f,
     -0.000146442006f, -4.39292198e-05f, -4.79924938e-06f},
    {-0.00118100736f, 0.000150753069f, 0.000721216784f, -0.000153210945f, -0.000155337082f,
     9.54656116e-06f, 1.31849984e-05f, 2.08662232e-06f},
};

}  // namespace dynquant
