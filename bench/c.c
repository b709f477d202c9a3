/* The yardstick of the benchmarks: advisory locks on libpq, written by hand.
 *
 *     c CONNINFO VARIANT[:N]
 *
 * bench/workers.lua says what is read and answered. */

#include <libpq-fe.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

enum { KEY = 4242, PAIRS_BETWEEN_LOOKS = 4, NUMBER_SIZE = 22 };

static PGconn *pg;
static int keys;     /* N of the variant */
static char *list;   /* those keys as an array of PostgreSQL */
static bool pending; /* a release was sent, its answer was not read yet */

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static double cpu(void) {
  struct rusage used;
  getrusage(RUSAGE_SELF, &used);
  return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
         (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
}

static void die(const char *what) {
  fprintf(stderr, "c: %s\n", what);
  exit(1);
}

/* ---- statements ------------------------------------------------------------------------ */

static void check(const PGresult *result, ExecStatusType status) {
  if (PQresultStatus(result) != status) die(PQerrorMessage(pg));
}

static void prepare(const char *name, const char *sql) {
  PGresult *result = PQprepare(pg, name, sql, 0, NULL);
  check(result, PGRES_COMMAND_OK);
  PQclear(result);
}

static void prepare_lock(void) {
  prepare("lock", "SELECT pg_advisory_lock($1::int8)");
  prepare("unlock", "SELECT pg_advisory_unlock($1::int8)");
}

/* The first letter of the first column. */
static char answer(PGresult *result) {
  char first;
  check(result, PGRES_TUPLES_OK);
  first = *PQgetvalue(result, 0, 0);
  PQclear(result);
  return first;
}

static void text(const char *sql) { answer(PQexec(pg, sql)); }

static void put_key(char bytes[8], uint64_t key) {
  for (int i = 8; i-- > 0; key >>= 8) bytes[i] = (char)key;
}

static char binary(const char *name, uint64_t key) {
  static const int length = 8, format = 1;
  char bytes[8];
  const char *value = bytes;
  put_key(bytes, key);
  return answer(PQexecPrepared(pg, name, 1, &value, &length, &format, 0));
}

static void send(const char *name) {
  static const int length = 8, format = 1;
  char bytes[8];
  const char *value = bytes;
  put_key(bytes, KEY);
  if (!PQsendQueryPrepared(pg, name, 1, &value, &length, &format, 0) || !PQpipelineSync(pg))
    die(PQerrorMessage(pg));
}

static void receive(void) {
  PGresult *sync;
  answer(PQgetResult(pg));
  if (PQgetResult(pg) != NULL) die("more than one result");
  sync = PQgetResult(pg);
  check(sync, PGRES_PIPELINE_SYNC);
  PQclear(sync);
}

static void many(const char *name) {
  const char *value = list;
  PGresult *result = PQexecPrepared(pg, name, 1, &value, NULL, NULL, 0);
  check(result, PGRES_TUPLES_OK);
  PQclear(result);
}

/* ---- variants -------------------------------------------------------------------------- */

static void pair_text(void) {
  text("SELECT pg_advisory_lock(4242)");
  text("SELECT pg_advisory_unlock(4242)");
}

static void command(const char *sql) {
  PGresult *result = PQexec(pg, sql);
  check(result, PGRES_COMMAND_OK);
  PQclear(result);
}

static void pair_transaction(void) {
  command("BEGIN");
  text("SELECT pg_advisory_xact_lock(4242)");
  command("COMMIT");
}

static void pair_binary(void) {
  binary("lock", KEY);
  binary("unlock", KEY);
}

static void begin_pipeline(void) {
  prepare_lock();
  if (!PQenterPipelineMode(pg)) die(PQerrorMessage(pg));
}

static void pair_pipeline(void) {
  send("lock");
  receive();
  send("unlock");
  receive();
}

static void collect(void) {
  if (pending) receive();
  pending = false;
}

static void pair_deferred(void) {
  send("lock");
  collect();
  receive();
  send("unlock");
  pending = true;
}

/* Whom nobody wakes has to look again and again. */
static void pair_poll(void) {
  static const struct timespec pause = {0, 50000000};
  while (binary("lock", KEY) != 't') nanosleep(&pause, NULL);
  binary("unlock", KEY);
}

static void prepare_poll(void) {
  prepare("lock", "SELECT pg_try_advisory_lock($1::int8)");
  prepare("unlock", "SELECT pg_advisory_unlock($1::int8)");
}

static void pair_each(void) {
  for (int key = 1; key <= keys; key++) binary("lock", (uint64_t)key);
  for (int key = 1; key <= keys; key++) binary("unlock", (uint64_t)key);
}

static void prepare_all(void) {
  char *end = list = malloc((size_t)keys * NUMBER_SIZE + 3);
  if (!list) die("out of memory");
  for (int key = 1; key <= keys; key++)
    end += snprintf(end, NUMBER_SIZE, "%c%d", key == 1 ? '{' : ',', key);
  memcpy(end, "}", 2);
  prepare("lock", "SELECT count(pg_advisory_lock(key)::text) FROM unnest($1::int8[]) AS key");
  prepare("unlock", "SELECT count(pg_advisory_unlock(key)) FROM unnest($1::int8[]) AS key");
}

static void pair_all(void) {
  many("lock");
  many("unlock");
}

/* Keys of its own: all workers hold theirs at the same time. */
static void prepare_held(void) {
  uint64_t own = (uint64_t)PQbackendPID(pg) * 1000000;
  prepare_lock();
  for (int key = 1; key <= keys; key++) binary("lock", own + (uint64_t)key);
}

static void nothing(void) {}

static const struct variant {
  const char *name;
  void (*prepare)(void), (*pair)(void), (*finish)(void);
} variants[] = {
    {"text", nothing, pair_text, nothing},
    {"transaction", nothing, pair_transaction, nothing},
    {"binary", prepare_lock, pair_binary, nothing},
    {"pipeline", begin_pipeline, pair_pipeline, nothing},
    {"deferred", begin_pipeline, pair_deferred, collect},
    {"poll", prepare_poll, pair_poll, nothing},   /* instead of waiting in the queue */
    {"each", prepare_lock, pair_each, nothing},   /* a pair is N locks and their releases */
    {"all", prepare_all, pair_all, nothing},      /* the same in one statement each */
    {"held", prepare_held, pair_binary, nothing}, /* beside N that are held already */
};

static const struct variant *find_variant(const char *name) {
  size_t length = strcspn(name, ":");
  if (name[length] == ':') keys = atoi(name + length + 1);
  for (size_t i = 0; i < sizeof variants / sizeof *variants; i++)
    if (strlen(variants[i].name) == length && strncmp(variants[i].name, name, length) == 0)
      return &variants[i];
  die("no such variant");
  return NULL;
}

/* ---- the worker ------------------------------------------------------------------------ */

static long run(const struct variant *variant, double seconds) {
  double end = now() + seconds;
  long pairs = 0;
  do {
    for (int i = 0; i < PAIRS_BETWEEN_LOOKS; i++) variant->pair();
    pairs += PAIRS_BETWEEN_LOOKS;
  } while (now() < end);
  return pairs;
}

static long count(const struct variant *variant, long pairs) {
  for (long i = 0; i < pairs; i++) variant->pair();
  return pairs;
}

int main(int argc, char **argv) {
  const struct variant *variant;
  char line[64];

  if (argc != 3) die("usage: c CONNINFO VARIANT[:N]");
  variant = find_variant(argv[2]);
  pg = PQconnectdb(argv[1]);
  if (PQstatus(pg) != CONNECTION_OK) die(PQerrorMessage(pg));
  variant->prepare();
  printf("ready %d\n", PQbackendPID(pg));
  fflush(stdout);

  while (fgets(line, sizeof line, stdin)) {
    double began = now(), used = cpu();
    long number = strtol(line + strcspn(line, " "), NULL, 10);
    long pairs = line[0] == 'r' ? run(variant, (double)number / 1000) : count(variant, number);
    variant->finish();
    printf("%ld %.9f %.9f\n", pairs, now() - began, cpu() - used);
    fflush(stdout);
  }
  PQfinish(pg);
  free(list);
  return 0;
}
