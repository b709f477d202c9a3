/* digest.c: the digests that other systems' keys are made with, and that neither libcrypto nor zlib
 * has. The same on machines of either byte order. */
#include "pglocks.h"

#include <string.h>

static uint32_t little_endian_32(const unsigned char *bytes) {
  return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

static uint64_t little_endian_64(const unsigned char *bytes) {
  return little_endian_32(bytes) | (uint64_t)little_endian_32(bytes + 4) << 32;
}

/* ---- FNV (Fowler, Noll, Vo) ------------------------------------------------------------- */

#define FNV_PRIME_32 0x01000193u
#define FNV_BASIS_32 0x811c9dc5u
#define FNV_PRIME_64 0x00000100000001b3u
#define FNV_BASIS_64 0xcbf29ce484222325u

uint32_t digest_fnv1_32(const char *bytes, size_t length) {
  uint32_t hash = FNV_BASIS_32;
  for (size_t i = 0; i < length; i++) hash = hash * FNV_PRIME_32 ^ (unsigned char)bytes[i];
  return hash;
}

uint64_t digest_fnv1_64(const char *bytes, size_t length) {
  uint64_t hash = FNV_BASIS_64;
  for (size_t i = 0; i < length; i++) hash = hash * FNV_PRIME_64 ^ (unsigned char)bytes[i];
  return hash;
}

uint64_t digest_fnv1a_64(const char *bytes, size_t length) {
  uint64_t hash = FNV_BASIS_64;
  for (size_t i = 0; i < length; i++) hash = (hash ^ (unsigned char)bytes[i]) * FNV_PRIME_64;
  return hash;
}

/* ---- PostgreSQL's hash_any: Jenkins' lookup3 -------------------------------------------- */

static uint32_t rotate_left(uint32_t n, int bits) { return n << bits | n >> (32 - bits); }

static void mix(uint32_t state[3]) {
  static const int turns[] = {4, 6, 8, 16, 19, 4};
  for (int i = 0; i < 6; i++) {
    uint32_t *a = &state[i % 3], *b = &state[(i + 1) % 3], *c = &state[(i + 2) % 3];
    *a -= *c;
    *a ^= rotate_left(*c, turns[i]);
    *c += *b;
  }
}

static void mix_last(uint32_t state[3]) {
  static const int turns[] = {14, 11, 25, 16, 4, 14, 24};
  for (int i = 0; i < 7; i++) {
    uint32_t *to = &state[(i + 2) % 3], *from = &state[(i + 1) % 3];
    *to ^= *from;
    *to -= rotate_left(*from, turns[i]);
  }
}

static void add(uint32_t state[3], const unsigned char *block) {
  for (size_t i = 0; i < 3; i++) state[i] += little_endian_32(block + 4 * i);
}

uint64_t digest_postgres(const char *bytes, size_t length, int64_t seed) {
  uint32_t start = 0x9e3779b9u + (uint32_t)length + 3923095u;
  uint32_t state[3] = {start, start, start};
  unsigned char last[12] = {0};
  if (seed != 0) {
    state[0] += (uint32_t)((uint64_t)seed >> 32);
    state[1] += (uint32_t)seed;
    mix(state);
  }
  for (; length >= 12; bytes += 12, length -= 12) {
    add(state, (const unsigned char *)bytes);
    mix(state);
  }
  /* The lowest byte of the third word is left to the length. */
  memcpy(last, bytes, length < 8 ? length : 8);
  if (length > 8) memcpy(last + 9, bytes + 8, length - 8);
  add(state, last);
  mix_last(state);
  return (uint64_t)state[1] << 32 | state[2];
}

/* ---- BLAKE2b (RFC 7693) ----------------------------------------------------------------- */

/* libcrypto has it with digests of 64 bytes only, which go into the digest itself. */
enum { BLAKE_BLOCK = 128, BLAKE_ROUNDS = 12, BLAKE_DIGEST = 8 };

static const uint64_t blake_iv[8] = {
    0x6a09e667f3bcc908u, 0xbb67ae8584caa73bu, 0x3c6ef372fe94f82bu, 0xa54ff53a5f1d36f1u,
    0x510e527fade682d1u, 0x9b05688c2b3e6c1fu, 0x1f83d9abfb41bd6bu, 0x5be0cd19137e2179u};

static uint64_t rotate_right(uint64_t n, int bits) { return n >> bits | n << (64 - bits); }

static void blake_mix(uint64_t *a, uint64_t *b, uint64_t *c, uint64_t *d, uint64_t x, uint64_t y) {
  *a += *b + x;
  *d = rotate_right(*d ^ *a, 32);
  *c += *d;
  *b = rotate_right(*b ^ *c, 24);
  *a += *b + y;
  *d = rotate_right(*d ^ *a, 16);
  *c += *d;
  *b = rotate_right(*b ^ *c, 63);
}

/* `total`: bytes up to the end of this block. */
static void blake_compress(uint64_t h[8], const unsigned char *block, uint64_t total, bool last) {
  static const unsigned char order[10][16] = {
      {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
      {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
      {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
      {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
      {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
      {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
      {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
      {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
      {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
      {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};
  uint64_t v[16], m[16];
  for (int i = 0; i < 8; i++) v[i] = h[i];
  for (int i = 0; i < 8; i++) v[i + 8] = blake_iv[i];
  for (size_t i = 0; i < 16; i++) m[i] = little_endian_64(block + 8 * i);
  v[12] ^= total;
  if (last) v[14] = ~v[14];
  for (int round = 0; round < BLAKE_ROUNDS; round++) {
    const unsigned char *o = order[round % 10];
    for (size_t i = 0; i < 4; i++) /* columns */
      blake_mix(&v[i], &v[i + 4], &v[i + 8], &v[i + 12], m[o[2 * i]], m[o[2 * i + 1]]);
    for (size_t i = 0; i < 4; i++) /* diagonals */
      blake_mix(&v[i], &v[(i + 1) % 4 + 4], &v[(i + 2) % 4 + 8], &v[(i + 3) % 4 + 12],
                m[o[2 * i + 8]], m[o[2 * i + 9]]);
  }
  for (int i = 0; i < 8; i++) h[i] ^= v[i] ^ v[i + 8];
}

uint64_t digest_blake2b(const char *bytes, size_t length) {
  unsigned char last[BLAKE_BLOCK] = {0};
  uint64_t h[8], total = 0;
  memcpy(h, blake_iv, sizeof h);
  h[0] ^= 0x01010000u ^ BLAKE_DIGEST; /* no key, and no tree of digests */
  for (; length > BLAKE_BLOCK; bytes += BLAKE_BLOCK, length -= BLAKE_BLOCK)
    blake_compress(h, (const unsigned char *)bytes, total += BLAKE_BLOCK, false);
  memcpy(last, bytes, length);
  blake_compress(h, last, total + length, true);
  return h[0];
}

/* ---- Java's String.hashCode ------------------------------------------------------------- */

/* The code point at *bytes, which moves on; -1: this is no UTF-8. */
static int32_t next_code_point(const char **bytes, const char *end) {
  static const int32_t least[] = {0, 0x80, 0x800, 0x10000};
  unsigned char first = (unsigned char)*(*bytes)++;
  int more = first < 0x80 ? 0 : first < 0xc0 ? -1 : first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
  int32_t point = first;
  if (more == 0) return point;
  if (more < 0 || first >= 0xf8 || end - *bytes < more) return -1;
  point &= 0x3f >> more;
  for (int i = 0; i < more; i++) {
    unsigned char next = (unsigned char)*(*bytes)++;
    if ((next & 0xc0) != 0x80) return -1;
    point = point << 6 | (next & 0x3f);
  }
  if (point < least[more] || point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) return -1;
  return point;
}

bool digest_java(const char *bytes, size_t length, uint32_t *hash) {
  const char *end = bytes + length;
  while (bytes < end) {
    int32_t point = next_code_point(&bytes, end);
    if (point < 0) return false;
    if (point >= 0x10000) { /* two units of UTF-16 */
      *hash = 31 * *hash + (0xd800u + ((uint32_t)(point - 0x10000) >> 10));
      point = 0xdc00 + ((point - 0x10000) & 0x3ff);
    }
    *hash = 31 * *hash + (uint32_t)point;
  }
  return true;
}
