// The activations and their derivatives on 16 floats.
#pragma once

#include "vector.h"

enum Activation { RELU, GELU, GELU_TANH, SILU };

static inline v16 clamp(v16 x, float least, float most) {
  v16 lo = splat(least), hi = splat(most);
  x = x < lo ? lo : x;  // a NaN stays one
  return x > hi ? hi : x;
}

// exp(x) = 2^n exp(r) with |r| <= ln(2)/2, Taylor's series up to r^7; 0 and infinity past what a float holds.
static inline v16 exp16(v16 x) {
  x = clamp(x, -87.3f, 88.7f);
  v16 shifter = splat(12582912.f), n = x * 1.44269504f + shifter;
  i16 power = ((i16)n - 0x4b400000);
  n -= shifter;
  v16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  v16 p = splat(1.f / 5040);
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + .5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  i16 half = power >> 1;  // in two steps, since 2^128 is no float
  return p * (v16)((half + 127) << 23) * (v16)((power - half + 127) << 23);
}

// erf(x) = x P(x^2) / Q(x^2), fitted on 0..3.95 to a relative error of 2.1e-8; past that it is 1 in float.
static inline v16 erf16(v16 given) {
  v16 x = clamp(given, -3.95f, 3.95f), one = splat(1.f);
  v16 s = x * x;
  v16 p = splat(2.02609652e-06f);
  p = p * s + 0.000284670806f;
  p = p * s + 0.00380728063f;
  p = p * s + 0.052872696f;
  p = p * s + 0.191529342f;
  p = p * s + 1.12837914f;
  v16 q = splat(3.7832896e-05f);
  q = q * s + 0.00117051859f;
  q = q * s + 0.015053308f;
  q = q * s + 0.11455098f;
  q = q * s + 0.503071139f;
  q = q * s + 1.f;
  v16 near = x * p / q;
  near = given >= 3.95f ? one : near;
  return given <= -3.95f ? -one : near;
}

static inline v16 sigmoid16(v16 z) { return 1.f / (1.f + exp16(-z)); }

struct Point {
  v16 value, slope;
};

template <int KIND>
static inline v16 activated(v16 z) {
  v16 zero = {};
  if (KIND == RELU) return z < zero ? zero : z;
  if (KIND == GELU) return .5f * z * (1.f + erf16(z * .707106781f));
  if (KIND == GELU_TANH) return z * sigmoid16(1.59576912f * (z + .044715f * z * z * z));
  return z * sigmoid16(z);
}

template <int KIND>
static inline Point activated_with_slope(v16 z) {
  v16 zero = {}, one = splat(1.f);
  if (KIND == RELU) return {z < zero ? zero : z, z <= zero ? zero : one};
  if (KIND == GELU) {
    v16 below = .5f + .5f * erf16(z * .707106781f);
    return {z * below, below + z * .398942280f * exp16(-.5f * z * z)};
  }
  if (KIND == GELU_TANH) {
    v16 s = sigmoid16(1.59576912f * (z + .044715f * z * z * z));
    return {z * s, s + z * s * (1.f - s) * 1.59576912f * (1.f + .134145f * z * z)};
  }
  v16 s = sigmoid16(z);
  return {z * s, s + z * s * (1.f - s)};
}
