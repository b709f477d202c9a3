/* scheme.c: how a name becomes a key, here and in the other systems that lock in PostgreSQL. */
#include "pglocks.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <zlib.h>

#define NO_DIGEST "libcrypto could not hash the name"
#define NOT_UTF8 "the name must be UTF-8 here"

struct part {
  const void *bytes;
  size_t length;
};

#define WHOLE(name) ((struct part){(name)->text, (name)->length})
#define LITERAL(string) ((struct part){string, sizeof(string) - 1})

/* ---- numbers ---------------------------------------------------------------------------- */

static uint64_t big_endian(const unsigned char *bytes) {
  uint64_t n = 0;
  for (int i = 0; i < 8; i++) n = n << 8 | bytes[i];
  return n;
}

static uint64_t little_endian(const unsigned char *bytes) {
  uint64_t n = 0;
  for (int i = 7; i >= 0; i--) n = n << 8 | bytes[i];
  return n;
}

static const char *pair(struct key *key, uint32_t first, uint32_t second) {
  *key = (struct key){first, second, 2};
  return NULL;
}

static const char *number(struct key *key, uint64_t n) {
  *key = (struct key){(uint32_t)(n >> 32), (uint32_t)n, 1};
  return NULL;
}

static uint64_t sign_extended(uint32_t n) { return (uint64_t)(int64_t)(int32_t)n; }

static uint32_t crc(const struct text *name) {
  return (uint32_t)crc32_z(0, (const unsigned char *)name->text, name->length);
}

/* ---- digests of libcrypto --------------------------------------------------------------- */

/* SHA-256, of every name that has no other scheme: to look it up for each would take twice as long as
 * to compute it. */
static const EVP_MD *sha256_type;

static void find_sha256(void) {
#if OPENSSL_VERSION_NUMBER >= 0x30000000L
  sha256_type = EVP_MD_fetch(NULL, "SHA256", NULL);
#endif
  if (sha256_type == NULL) sha256_type = EVP_sha256();
}

void schemes_open(void) {
  static pthread_once_t found = PTHREAD_ONCE_INIT;
  pthread_once(&found, find_sha256);
}

/* The first eight bytes of the digest of all parts, one after the other. */
static bool digest(const EVP_MD *type, const struct part *parts, int count, unsigned char *first) {
  unsigned char whole[EVP_MAX_MD_SIZE];
  EVP_MD_CTX *context = EVP_MD_CTX_new();
  bool done = context != NULL && EVP_DigestInit_ex(context, type, NULL);
  for (int i = 0; done && i < count; i++)
    done = EVP_DigestUpdate(context, parts[i].bytes, parts[i].length);
  done = done && EVP_DigestFinal_ex(context, whole, NULL);
  EVP_MD_CTX_free(context);
  if (done) memcpy(first, whole, 8);
  return done;
}

/* The digest of "namespace<separator>name", or of the name alone. */
static const char *joined(const EVP_MD *type, const struct space *space, struct part separator,
                          const struct text *name, uint64_t (*order)(const unsigned char *),
                          struct key *key) {
  struct part parts[] = {WHOLE(&space->text), separator, WHOLE(name)};
  int skipped = space->is == SPACE_NONE ? 2 : 0;
  unsigned char first[8];
  if (!digest(type, parts + skipped, 3 - skipped, first)) return NO_DIGEST;
  return number(key, order(first));
}

/* ---- ours ------------------------------------------------------------------------------- */

/* A bare name is hashed with SHA-256. With a namespace it is SHA-512 over the namespace's length
 * (8 bytes, big-endian), the namespace and the name: the length keeps ("a", "bc") and ("ab", "c")
 * apart, the other digest keeps both apart from every bare name. */
static const char *sha256(const struct text *name, const struct space *space, struct key *key) {
  unsigned char length[8], first[8];
  struct part parts[] = {{length, sizeof length}, WHOLE(&space->text), WHOLE(name)};
  bool done;
  for (int i = 0; i < 8; i++)
    length[i] = (unsigned char)((uint64_t)space->text.length >> (56 - 8 * i));
  if (space->is == SPACE_NONE)
    done = digest(sha256_type, &parts[2], 1, first);
  else
    done = digest(EVP_sha512(), parts, 3, first);
  return done ? number(key, big_endian(first)) : NO_DIGEST;
}

/* ---- Python ----------------------------------------------------------------------------- */

static const char *django_pglocks(const struct text *name, const struct space *space,
                                  struct key *key) {
  (void)space;
  return number(key, sign_extended(crc(name)));
}

static const char *django_pglock(const struct text *name, const struct space *space,
                                 struct key *key) {
  return joined(EVP_sha256(), space, LITERAL(""), name, little_endian, key);
}

/* The namespace is its `app_name`. */
static const char *pals(const struct text *name, const struct space *space, struct key *key) {
  return joined(EVP_sha1(), space, LITERAL("."), name, little_endian, key);
}

static const char *py_postgresql_lock(const struct text *name, const struct space *space,
                                      struct key *key) {
  return joined(EVP_sha1(), space, LITERAL(""), name, big_endian, key);
}

static const char *sqlalchemy_dlock(const struct text *name, const struct space *space,
                                    struct key *key) {
  (void)space;
  return number(key, digest_blake2b(name->text, name->length));
}

/* ---- Ruby ------------------------------------------------------------------------------- */

/* The namespace is its WITH_ADVISORY_LOCK_PREFIX, which counts as a number. */
static const char *with_advisory_lock(const struct text *name, const struct space *space,
                                      struct key *key) {
  return pair(key, crc(name) & 0x7fffffffu, (uint32_t)space->number & 0x7fffffffu);
}

static const char *heroku_pg_lock(const struct text *name, const struct space *space,
                                  struct key *key) {
  (void)space;
  return pair(key, 0x80000000u, crc(name));
}

/* The name is that of the database. */
static const char *rails(const struct text *name, const struct space *space, struct key *key) {
  (void)space;
  return number(key, (uint64_t)2053462845 * crc(name));
}

/* The namespace is the table. */
static const char *good_job(const struct text *name, const struct space *space, struct key *key) {
  return joined(EVP_md5(), space, LITERAL("-"), name, big_endian, key);
}

/* ---- Node ------------------------------------------------------------------------------- */

static const char *npm_advisory_lock(const struct text *name, const struct space *space,
                                     struct key *key) {
  const char *failed = django_pglock(name, space, key); /* the same bytes */
  return failed != NULL ? failed : pair(key, key->objid, key->classid);
}

/* Each namespace gives the next seed; of a list key.c has made one already. */
static const char *npm_pg_advisory_lock(const struct text *name, const struct space *space,
                                        struct key *key) {
  int64_t seed = space->number;
  if (space->is == SPACE_TEXT) seed = space_seed(seed, space->text.text, space->text.length);
  return number(key, digest_postgres(name->text, name->length, seed));
}

/* ---- .NET ------------------------------------------------------------------------------- */

/* `digits` of base 16 from `text`. */
static bool hexadecimal(const char *text, int digits, uint64_t *n) {
  *n = 0;
  for (int i = 0; i < digits; i++) {
    static const char known[] = "0123456789abcdef0123456789ABCDEF";
    const char *found = text[i] != '\0' ? strchr(known, text[i]) : NULL;
    if (found == NULL) return false;
    *n = *n << 4 | (uint64_t)(found - known) % 16;
  }
  return true;
}

/* Up to nine ASCII characters stand for themselves: seven bits each, then a 0 and 1s to the end. */
static bool as_characters(const struct text *name, uint64_t *n) {
  enum { MOST = 9 };
  *n = 0;
  if (name->length > MOST) return false;
  for (size_t i = 0; i < name->length; i++) {
    if ((unsigned char)name->text[i] > 0x7f) return false;
    *n = *n << 7 | (unsigned char)name->text[i];
  }
  *n <<= 1;
  for (size_t i = name->length; i < MOST; i++) *n = *n << 7 | 0x7f;
  return true;
}

static const char *distributed_lock(const struct text *name, const struct space *space,
                                    struct key *key) {
  uint64_t n, second;
  if (as_characters(name, &n)) return pair(key, (uint32_t)(n >> 32), (uint32_t)n);
  if (name->length == 16 && hexadecimal(name->text, 16, &n)) return number(key, n);
  if (name->length == 17 && name->text[8] == ',' && hexadecimal(name->text, 8, &n) &&
      hexadecimal(name->text + 9, 8, &second))
    return pair(key, (uint32_t)n, (uint32_t)second);
  return joined(EVP_sha1(), space, LITERAL(""), name, little_endian, key);
}

/* ---- Rust ------------------------------------------------------------------------------- */

/* HKDF-SHA256 (RFC 5869) without a salt, of which one round is enough. */
static const char *sqlx(const struct text *name, const struct space *space, struct key *key) {
  static const unsigned char salt[32], info[] = "SQLx (Rust) Postgres advisory lock\x01";
  unsigned char secret[EVP_MAX_MD_SIZE], out[EVP_MAX_MD_SIZE];
  unsigned int length;
  (void)space;
  if (HMAC(EVP_sha256(), salt, sizeof salt, (const unsigned char *)name->text, name->length, secret,
           &length) == NULL ||
      HMAC(EVP_sha256(), secret, (int)length, info, sizeof info - 1, out, NULL) == NULL)
    return NO_DIGEST;
  return number(key, little_endian(out));
}

/* The name is that of the database. */
static const char *sqlx_migrate(const struct text *name, const struct space *space,
                                struct key *key) {
  (void)space;
  return number(key, (uint64_t)0x3d32ad9e * crc(name));
}

/* ---- PHP -------------------------------------------------------------------------------- */

static const char *symfony(const struct text *name, const struct space *space, struct key *key) {
  (void)space;
  return number(key, crc(name));
}

/* ---- Go --------------------------------------------------------------------------------- */

/* The name is schema, table and database, joined by NUL. */
static const char *golang_migrate(const struct text *name, const struct space *space,
                                  struct key *key) {
  (void)space;
  return number(key, (uint32_t)(crc(name) * 1486364155u));
}

/* It has one lock. */
static const char *goose(const struct text *name, const struct space *space, struct key *key) {
  if (name->length != 5 || memcmp(name->text, "goose", 5) != 0)
    return "the one lock of goose has the name 'goose'";
  return symfony(name, space, key);
}

/* The namespace is its AdvisoryLockPrefix. */
static const char *river(const struct text *name, const struct space *space, struct key *key) {
  if (space->is == SPACE_NONE) return number(key, digest_fnv1_64(name->text, name->length));
  *key = (struct key){(uint32_t)space->number, digest_fnv1_32(name->text, name->length), 1};
  return NULL;
}

static const char *atlas(const struct text *name, const struct space *space, struct key *key) {
  (void)space;
  return number(key, digest_fnv1_32(name->text, name->length));
}

static const char *fnv1a_64(const struct text *name, const struct space *space, struct key *key) {
  (void)space;
  return number(key, digest_fnv1a_64(name->text, name->length));
}

/* ---- Java ------------------------------------------------------------------------------- */

static bool java_quoted(const struct text *identifier, uint32_t *hash) {
  const char *rest = identifier->text, *end = rest + identifier->length, *quote;
  bool is_text = digest_java("\"", 1, hash);
  while (is_text && (quote = memchr(rest, '"', (size_t)(end - rest))) != NULL) {
    is_text = digest_java(rest, (size_t)(quote + 1 - rest), hash) && digest_java("\"", 1, hash);
    rest = quote + 1;
  }
  return is_text && digest_java(rest, (size_t)(end - rest), hash) && digest_java("\"", 1, hash);
}

/* The name is the table as Flyway quotes it, or, with the schema as the namespace, unquoted. */
static const char *flyway(const struct text *name, const struct space *space, struct key *key) {
  uint32_t hash = 0;
  bool is_text;
  if (space->is == SPACE_NONE)
    is_text = digest_java(name->text, name->length, &hash);
  else
    is_text = java_quoted(&space->text, &hash) && digest_java(".", 1, &hash) &&
              java_quoted(name, &hash);
  return is_text ? number(key, 77431708279161u + sign_extended(hash)) : NOT_UTF8;
}

/* ---- PostgreSQL ------------------------------------------------------------------------- */

static const char *hashtext(const struct text *name, const struct space *space, struct key *key) {
  (void)space;
  return number(key, sign_extended((uint32_t)digest_postgres(name->text, name->length, 0)));
}

/* The namespace is the seed. */
static const char *hashtextextended(const struct text *name, const struct space *space,
                                    struct key *key) {
  return number(key, digest_postgres(name->text, name->length, space->number));
}

/* ---- all of them ------------------------------------------------------------------------ */

static const struct scheme schemes[] = {
    {"sha256", TAKES_TEXT, sha256}, /* the default */
    {"atlas", TAKES_NONE, atlas},
    {"distributedlock", TAKES_NONE, distributed_lock},
    {"django-pglock", TAKES_NONE, django_pglock},
    {"django-pglocks", TAKES_NONE, django_pglocks},
    {"flyway", TAKES_TEXT, flyway},
    {"fnv1a64", TAKES_NONE, fnv1a_64},
    {"golang-migrate", TAKES_NONE, golang_migrate},
    {"good_job", TAKES_TEXT, good_job},
    {"goose", TAKES_NONE, goose},
    {"hashtext", TAKES_NONE, hashtext},
    {"hashtextextended", TAKES_INT64, hashtextextended},
    {"heroku-pg_lock", TAKES_NONE, heroku_pg_lock},
    {"laravel", TAKES_NONE, hashtext},
    {"npm-advisory-lock", TAKES_NONE, npm_advisory_lock},
    {"npm-pg-advisory-lock", TAKES_TEXTS, npm_pg_advisory_lock},
    {"pals", TAKES_TEXT, pals},
    {"py-postgresql-lock", TAKES_NONE, py_postgresql_lock},
    {"rails", TAKES_NONE, rails},
    {"river", TAKES_INT32, river},
    {"sqlalchemy-dlock", TAKES_NONE, sqlalchemy_dlock},
    {"sqlx", TAKES_NONE, sqlx},
    {"sqlx-migrate", TAKES_NONE, sqlx_migrate},
    {"symfony", TAKES_NONE, symfony},
    {"with_advisory_lock", TAKES_INT64, with_advisory_lock},
};

const struct scheme *scheme_default(void) { return &schemes[0]; }

const struct scheme *scheme_find(const char *name) {
  for (size_t i = 0; i < sizeof schemes / sizeof *schemes; i++)
    if (strcmp(schemes[i].name, name) == 0) return &schemes[i];
  return NULL;
}

int64_t space_seed(int64_t seed, const char *namespace, size_t length) {
  return (int64_t)digest_postgres(namespace, length, seed);
}

/* An environment variable is a text. */
static bool space_as_number(const struct space *space, int64_t least, int64_t most, int64_t *n) {
  char *end;
  *n = space->number;
  if (space->is == SPACE_TEXT) {
    errno = 0;
    *n = strtoll(space->text.text, &end, 10);
    if (errno != 0 || space->text.length == 0 || end != space->text.text + space->text.length ||
        strchr("+-0123456789", space->text.text[0]) == NULL)
      return false;
  }
  return (space->is == SPACE_TEXT || space->is == SPACE_NUMBER) && *n >= least && *n <= most;
}

const char *scheme_adopt(const struct scheme *scheme, struct space *space) {
  if (space->is == SPACE_NONE) return NULL;
  switch (scheme->takes) {
  case TAKES_NONE:
    return "no namespace";
  case TAKES_TEXT:
    return space->is == SPACE_TEXT ? NULL : "a string as its namespace";
  case TAKES_TEXTS:
    return space->is != SPACE_NUMBER ? NULL : "a string or a list of strings as its namespace";
  case TAKES_INT32:
    return space_as_number(space, INT32_MIN, INT32_MAX, &space->number)
               ? NULL
               : "a 32-bit integer as its namespace";
  default:
    return space_as_number(space, INT64_MIN, INT64_MAX, &space->number)
               ? NULL
               : "a 64-bit integer as its namespace";
  }
}
