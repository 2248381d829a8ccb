/* Vectors of 16 numbers in GCC's vector extensions, for the kernels of this folder. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4)));

static inline vec splat(float x) { return (vec){0} + x; }

/* exp(x) for x <= 0, to about 2 units in the last place: 2^n * 2^f with a polynomial for 2^f, |f| <= 1/2. */
static inline vec exp_vec(vec x) {
    const ivec deep = x < splat(-87.0f);
    x = (vec)(((ivec)x & ~deep) | ((ivec)splat(-87.0f) & deep));
    const vec t = x * 1.44269504f;
    const vec magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    const vec n = (t + magic) - magic;
    const vec f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    const ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return p * (vec)power;
}

/* The nearest bfloat16, ties to even. */
static inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    if (x != x) return 0x7fc0;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
