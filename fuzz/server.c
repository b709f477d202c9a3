/* server.c: a server that says anything, and a client that must know what it holds.
 *
 * The input is one program for both sides: what the client calls, and what the server answers while
 * the client waits. Both are in this thread: the client's steps, its ppoll, its clock and its
 * cancel requests are replaced (the linker's --wrap), so that nothing waits and a run repeats
 * itself exactly.
 *
 * Three oracles. What libpq tells the client is recorded where it is told, and a lock that the client
 * calls held must have been granted by a complete answer, and not been given up since. One that it
 * says not to have got must have been denied by such an answer. And where the server is `honest`,
 * doing only what PostgreSQL does, the client must in the end know of exactly the locks that the
 * server has, and whenever it has heard all, call no lock held that the server has not, and let go of
 * whatever the server has that it does not call held.
 *
 * The program may be one of many owners on the connection, too: they try many keys at once, join one another's
 * locks, and hand them on when they are told of an end. A release that is put off must be sent before anything
 * else is, and none while a cancel request is under way, which would strike it. */
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <libpq-fe.h>

enum {
  MAX_KEYS = 32,       /* keys, modes and scopes */
  MAX_SET = 4,         /* keys of one call */
  MAX_STATEMENTS = 8,  /* of a command: what is between two Syncs */
  MAX_SAVEPOINTS = 16, /* on the server; of the user's own half as many */
  MAX_COMMANDS = 256,  /* in a run */
  MAX_LOCKS = 8,       /* that the program has a name for */
  MAX_TURNS = 3000,    /* of one operation */
  MAX_WAITS = 400,     /* after the program's end */
  FILES = 16           /* descriptors looked at for leaks */
};

/* The main thread; while that is inside a call that blocks, another one with the same on its
 * stack. */
static lua_State *L, *meanwhile;
/* The same for what is called when the scope of a lock ends that has joined another. */
static lua_State *ending;

/* Places on the stack. */
enum { CORE = 1, START, CONNECTION_METHODS, LOCK_METHODS, CONNECTION, LOCKS, TOP = LOCKS };

static struct {
  bool honest, scheduled, silent, closes;
  bool connected; /* the handshake is over */
  bool busy;      /* an operation is being driven */
  bool blocks;    /* by a call that blocks */
  bool abandoned; /* nobody will ask for the result of the operation */
  bool commits_deferred;
  bool ends;      /* on_end has been called, and has not returned */
  unsigned at_end; /* what it does */
  int handed_on, tried; /* the number of the next command, when it tried a key; or -1 */
  int waits;      /* since the program's end */
} run;

/* ---- keys, and what is known of each --------------------------------------------------- */

struct known {
  uint32_t classid, objid;
  int objsubid;
  /* The latest command that asks for it, that unlocks it, and whose answer denies it; or -1. */
  int wanted, given_up, denied;
  int held;                       /* by the server's own count, in the session's scope */
  int at[MAX_SAVEPOINTS + 1];     /* in the transaction's, by the savepoint behind which it was taken */
  bool shared, transaction;       /* transaction: of its scope */
  bool believed;  /* the answers that libpq has told say that it is held */
  bool disproved; /* the guard's do not: the client must say so when its operation is over */
  bool late;      /* let go, which the client may put off until it sends anything else */
};

static struct known known[MAX_KEYS];
static int known_count;

/* NULL: nothing is. */
static struct known *known_already(uint32_t classid, uint32_t objid, int objsubid, bool shared,
                                   bool transaction) {
  for (struct known *k = known; k < known + known_count; k++)
    if (k->classid == classid && k->objid == objid && k->objsubid == objsubid &&
        k->shared == shared && k->transaction == transaction)
      return k;
  return NULL;
}

static struct known *know(uint32_t classid, uint32_t objid, int objsubid, bool shared,
                          bool transaction) {
  struct known *k = known_already(classid, objid, objsubid, shared, transaction);
  if (k != NULL) return k;
  k = &known[known_count];
  if (known_count == MAX_KEYS) finding("more keys than there are");
  known_count++;
  k->classid = classid;
  k->objid = objid;
  k->objsubid = objsubid;
  k->shared = shared;
  k->transaction = transaction;
  k->wanted = k->given_up = k->denied = -1;
  k->believed = k->disproved = k->late = false;
  k->held = 0;
  memset(k->at, 0, sizeof k->at);
  return k;
}

/* The same key and mode in the other scope; or NULL. */
static struct known *in_other_scope(const struct known *k) {
  return known_already(k->classid, k->objid, k->objsubid, k->shared, !k->transaction);
}

/* How often the server has it. */
static int counted(const struct known *k) {
  int n = k->held;
  for (int i = 0; i <= MAX_SAVEPOINTS; i++) n += k->at[i];
  return n;
}

/* As pg_locks shows it, where the scopes are one. */
static bool is_shown(const struct known *k) {
  const struct known *other = in_other_scope(k);
  return counted(k) > 0 || (other != NULL && counted(other) > 0);
}

/* Of one mode, in the order in which the client names them. */
struct set {
  struct known *keys[MAX_SET];
  int count;
};

static void add(struct set *set, struct known *k) {
  if (set->count == MAX_SET) finding("more keys at once than there are");
  set->keys[set->count++] = k;
}

/* ---- commands: what the client has asked, and what libpq told it ----------------------- */

enum kind {
  PREPARE,
  LOCK,
  TRY_LOCK,
  UNLOCK,
  LOOK,         /* the guard */
  GUARD_UNLOCK, /* the guard that lets go */
  UNLOCK_ALL,
  BEGIN,
  COMMIT,
  ROLLBACK,
  SAVEPOINT,
  ROLLBACK_TO,
  RELEASE_SAVEPOINT,
  TOKEN,
  NOTHING_AT_ALL,
  SELECT
};

struct statement {
  enum kind kind;
  bool executes_prepared;
  char name[32]; /* of the prepared statement, or of the savepoint */
  bool array;    /* its keys are one, be it of one key */
  bool each;     /* tries them each for itself: a mark for each */
  bool boolean;  /* a lock that answers with true, not with void */
  bool chain;    /* COMMIT or ROLLBACK AND CHAIN */
  bool wanted;   /* asked within a call that may end the user's transaction */
  bool commits;  /* and within one that may COMMIT one of a lock */
  struct set on;
};

static struct command {
  struct statement statements[MAX_STATEMENTS];
  int count;
  bool failed;    /* libpq told of an error */
  bool committed; /* and of this tag */
  bool has_row;
  bool has_value; /* its row's, which is not NULL: only a statement about locks has one */
  int length;
  char value[MAX_SET];
} commands[MAX_COMMANDS + 1];

static bool may_end, may_commit; /* such a call is under way */

static int asked, received, answered, told; /* numbers of commands: by whom, so far */
/* The latest command that is to end the transaction; that was told to have found or left none; and to have
 * gone back to a savepoint; or -1. */
static int ended, idle, gone_back;
static bool told_failed; /* that the transaction has, by the last that was told */
static bool seems_failed; /* by the last that could tell: libpq cannot as long as it has more */

static uint32_t big_endian(const char *bytes) {
  const unsigned char *b = (const unsigned char *)bytes;
  return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
}

/* An int8[] in binary form, as array_recv takes it, and how many of the keys in it are no pairs. */
static void read_array(struct set *on, const char *const *values, const int *lengths, bool shared,
                       bool transaction) {
  const char *element = values[0] + 20;
  uint32_t count = big_endian(values[0] + 12), wide = big_endian(values[1]);
  if (big_endian(values[0]) != 1 || big_endian(values[0] + 4) != 0 ||
      big_endian(values[0] + 8) != 20 || big_endian(values[0] + 16) != 1 || count == 0 ||
      lengths[0] != 20 + 12 * (int)count || lengths[1] != 4 || wide > count)
    finding("an array that is none");
  for (uint32_t i = 0; i < count; i++, element += 12) {
    if (big_endian(element) != 8) finding("an element that is no int8");
    add(on, know(big_endian(element + 4), big_endian(element + 8), i < wide ? 1 : 2, shared, transaction));
  }
}

/* The keys that binary parameters name: many, or one 64-bit key, or a pair. */
static void read_keys(struct statement *s, const char *const *values, const int *lengths, bool pair,
                      bool shared, bool transaction) {
  if (s->array)
    read_array(&s->on, values, lengths, shared, transaction);
  else
    add(&s->on, know(big_endian(values[0]), big_endian(pair ? values[1] : values[0] + 4),
                     pair ? 2 : 1, shared, transaction));
}

static struct statement *ask(enum kind kind) {
  struct command *c = &commands[asked];
  struct statement *s = &c->statements[c->count];
  if (c->count == MAX_STATEMENTS) finding("more statements in a command than there are");
  c->count++;
  memset(s, 0, sizeof *s);
  s->kind = kind;
  s->wanted = may_end;
  s->commits = may_end || may_commit;
  return s;
}

static void gives_up(struct known *k) {
  k->believed = k->late = false;
  k->given_up = asked;
}

static void note_asked(const struct statement *s) {
  if (s->kind == COMMIT || s->kind == ROLLBACK) ended = asked;
  for (int i = 0; i < s->on.count; i++)
    if (s->kind == UNLOCK || s->kind == GUARD_UNLOCK)
      gives_up(s->on.keys[i]);
    else if (s->kind != LOOK)
      s->on.keys[i]->wanted = asked;
}

static void ask_prepared(const char *name, const char *const *values, const int *lengths) {
  struct statement *s = ask(strcmp(name, "pglocks_token") == 0 ? TOKEN
                            : strstr(name, "unlock") != NULL   ? UNLOCK
                            : strstr(name, "try") != NULL      ? TRY_LOCK
                                                               : LOCK);
  trace("  command %d asks: %s", asked, name);
  snprintf(s->name, sizeof s->name, "%s", name);
  s->executes_prepared = true;
  if (s->kind == TOKEN) return;
  s->each = strstr(name, "_each") != NULL;
  s->array = s->each || strstr(name, "_all") != NULL;
  s->boolean = strstr(name, "xact_timed") != NULL;
  read_keys(s, values, lengths, strstr(name, "_44") != NULL, strstr(name, "shared") != NULL,
            strstr(name, "_xact_") != NULL);
  note_asked(s);
}

static void ask_sql(const char *sql, const char *const *values, const int *lengths) {
  static const struct {
    const char *begin;
    enum kind kind;
  } simple[] = {{"BEGIN", BEGIN},
                {"COMMIT", COMMIT},
                {"ROLLBACK TO", ROLLBACK_TO},
                {"ROLLBACK", ROLLBACK},
                {"SAVEPOINT", SAVEPOINT},
                {"RELEASE", RELEASE_SAVEPOINT}};
  struct statement *s = ask(SELECT);
  if (strstr(sql, "pg_advisory_unlock_all") != NULL)
    s->kind = UNLOCK_ALL;
  else if (strstr(sql, "pg_locks l") != NULL) {
    s->kind = strstr(sql, "pg_advisory_unlock") != NULL ? GUARD_UNLOCK : LOOK;
    s->array = true;
    read_keys(s, values, lengths, false, strstr(sql, "'ShareLock'") != NULL, false);
  } else if (*sql == '\0' || (strncmp(sql, "/*", 2) == 0 && strstr(sql, "*/ SELECT") == NULL)) {
    if (*sql != '\0' && strcmp(strstr(sql, "*/"), "*/ ") != 0)
      finding("a comment without an end: %s", sql);
    s->kind = NOTHING_AT_ALL;
  } else if (strncmp(sql, "/*", 2) == 0) {
    const char *f = strstr(sql, "*/ SELECT");
    /* Of many keys, what waits no longer than a timeout tries each before it sets that. */
    s->kind = strstr(f, "try_") != NULL && strstr(f, "lock_timeout") == NULL ? TRY_LOCK : LOCK;
    s->array = strstr(f, "unnest($1)") != NULL;
    s->boolean = strstr(f, "_xact_") != NULL && strstr(f, "lock_timeout") != NULL;
    read_keys(s, values, lengths, strstr(f, "$1,$2)") != NULL, strstr(f, "_shared(") != NULL,
              strstr(f, "_xact_") != NULL);
  } else
    for (size_t i = 0; i < sizeof simple / sizeof *simple; i++)
      if (strncmp(sql, simple[i].begin, strlen(simple[i].begin)) == 0) {
        s->kind = simple[i].kind;
        s->chain = strstr(sql, "CHAIN") != NULL;
        snprintf(s->name, sizeof s->name, "%s", strrchr(sql, ' ') != NULL ? strrchr(sql, ' ') + 1 : "");
        break;
      }
  trace("  command %d asks: %s", asked, sql);
  note_asked(s);
  for (int i = 0; s->kind == UNLOCK_ALL && i < known_count; i++) gives_up(&known[i]);
}

enum said { NOTHING, HELD, NOT_HELD };

/* What a complete answer says of a key of its statement; of one that is unlocked, what it was. */
static enum said said_of(const struct command *c, const struct statement *s, int key) {
  if (c->failed || !c->has_value) return NOTHING;
  switch (s->kind) {
  case LOCK: /* void, of one key; else true, when it has them all */
    if (!s->array && !s->boolean) return c->length != 1 ? HELD : NOTHING;
    return c->length == 1 && *c->value == 't' ? HELD : NOTHING;
  case TRY_LOCK:
    if (!s->each) return c->length != 1 ? NOTHING : *c->value == 't' ? HELD : NOT_HELD;
    /* fall through */
  default: /* a mark for each */
    return c->length != s->on.count ? NOTHING : c->value[key] == 't' ? HELD : NOT_HELD;
  }
}

/* Of what has looked whether it is held: the scopes are one there. */
static void conclude_look(struct known *k, enum said said, int n) {
  struct known *other = in_other_scope(k);
  if (other == NULL) return;
  if (said == NOT_HELD) {
    other->denied = n;
    other->disproved = true;
  } else if (said == HELD)
    other->disproved = false;
}

static void conclude(int n, PGTransactionStatusType status) {
  const struct command *c = &commands[n];
  told_failed = status == PQTRANS_INERROR;
  if (status != PQTRANS_ACTIVE && status != PQTRANS_UNKNOWN) seems_failed = told_failed;
  if (status == PQTRANS_IDLE) idle = n;
  for (int i = 0; status == PQTRANS_IDLE && i < known_count; i++)
    if (known[i].transaction) known[i].believed = false;
  for (const struct statement *s = c->statements; s < c->statements + c->count; s++) {
    if (s->kind == ROLLBACK_TO && !c->failed) gone_back = n;
    for (int i = 0; i < s->on.count; i++) {
      struct known *k = s->on.keys[i];
      enum said said = said_of(c, s, i);
      if (said != NOTHING) k->denied = said == NOT_HELD ? n : -1;
      if (s->kind == LOOK) conclude_look(k, said, n);
      if (k->transaction && c->failed) k->denied = n; /* what has failed has ended with all it took */
      if (k->given_up >= n) continue;
      if (said == HELD) {
        k->believed = !k->transaction || status != PQTRANS_IDLE;
        k->disproved = false;
      } else if (said == NOT_HELD && s->kind == LOOK)
        k->disproved = true;
    }
  }
}

/* ---- libpq, watched -------------------------------------------------------------------- */

/* Leaks are counted here. LeakSanitizer is off, because libpq itself forgets results when a server
 * breaks the protocol, as with a RowDescription before an early ReadyForQuery. */
static struct {
  int connections, results, cancels, blocks;
} open_now;

int __lsan_is_turned_off(void);

int __lsan_is_turned_off(void) { return 1; }

void *__real_malloc(size_t);
void *__wrap_malloc(size_t);
void *__real_calloc(size_t, size_t);
void *__wrap_calloc(size_t, size_t);
void *__real_realloc(void *, size_t);
void *__wrap_realloc(void *, size_t);
void __real_free(void *);
void __wrap_free(void *);

static unsigned fails_in; /* so many allocations there is no memory, once; 0: there is */
static bool memory_failed; /* in this run */

static bool is_out_of_memory(void) {
  if (fails_in == 0 || --fails_in > 0) return false;
  memory_failed = true;
  trace("  an allocation fails");
  return true;
}

/* Of pglocks' own sources, as libpq and Lua are not linked anew. */
void *__wrap_malloc(size_t size) {
  void *block = is_out_of_memory() ? NULL : __real_malloc(size);
  if (block != NULL) open_now.blocks++;
  return block;
}

void *__wrap_calloc(size_t count, size_t size) {
  void *block = is_out_of_memory() ? NULL : __real_calloc(count, size);
  if (block != NULL) open_now.blocks++;
  return block;
}

void *__wrap_realloc(void *old, size_t size) {
  void *block = is_out_of_memory() ? NULL : __real_realloc(old, size);
  if (old == NULL && block != NULL) open_now.blocks++;
  return block;
}

void __wrap_free(void *block) {
  if (block != NULL) open_now.blocks--;
  __real_free(block);
}

int __real_PQsendPrepare(PGconn *, const char *, const char *, int, const Oid *);
int __wrap_PQsendPrepare(PGconn *, const char *, const char *, int, const Oid *);
int __real_PQsendQueryParams(PGconn *, const char *, int, const Oid *, const char *const *,
                             const int *, const int *, int);
int __wrap_PQsendQueryParams(PGconn *, const char *, int, const Oid *, const char *const *,
                             const int *, const int *, int);
int __real_PQsendQueryPrepared(PGconn *, const char *, int, const char *const *, const int *,
                               const int *, int);
int __wrap_PQsendQueryPrepared(PGconn *, const char *, int, const char *const *, const int *,
                               const int *, int);
int __real_PQpipelineSync(PGconn *);
int __wrap_PQpipelineSync(PGconn *);
PGresult *__real_PQgetResult(PGconn *);
PGresult *__wrap_PQgetResult(PGconn *);
void __real_PQclear(PGresult *);
void __wrap_PQclear(PGresult *);
PGconn *__real_PQconnectStartParams(const char *const *, const char *const *, int);
PGconn *__wrap_PQconnectStartParams(const char *const *, const char *const *, int);
void __real_PQfinish(PGconn *);
void __wrap_PQfinish(PGconn *);
PGcancel *__real_PQgetCancel(PGconn *);
PGcancel *__wrap_PQgetCancel(PGconn *);
void __real_PQfreeCancel(PGcancel *);
void __wrap_PQfreeCancel(PGcancel *);

int __wrap_PQsendPrepare(PGconn *pg, const char *name, const char *sql, int n, const Oid *types) {
  struct statement *s = ask(PREPARE);
  snprintf(s->name, sizeof s->name, "%s", name);
  return __real_PQsendPrepare(pg, name, sql, n, types);
}

int __wrap_PQsendQueryParams(PGconn *pg, const char *sql, int n, const Oid *types,
                             const char *const *values, const int *lengths, const int *formats,
                             int format) {
  ask_sql(sql, values, lengths);
  return __real_PQsendQueryParams(pg, sql, n, types, values, lengths, formats, format);
}

int __wrap_PQsendQueryPrepared(PGconn *pg, const char *name, int n, const char *const *values,
                               const int *lengths, const int *formats, int format) {
  ask_prepared(name, values, lengths);
  return __real_PQsendQueryPrepared(pg, name, n, values, lengths, formats, format);
}

static int thread_count; /* cancel requests under way */
static bool threads_refused;

static bool only_unlocks(const struct command *c) {
  return c->count > 0 && c->statements[c->count > 1 && c->statements[0].kind == PREPARE].kind == UNLOCK;
}

int __wrap_PQpipelineSync(PGconn *pg) {
  for (int i = 0; !only_unlocks(&commands[asked]) && i < known_count; i++)
    if (known[i].late) finding("command %d comes before a release that was put off", asked);
  if (thread_count > 0) finding("command %d is sent while a cancel request is under way", asked);
  if (asked == MAX_COMMANDS) finding("the client goes on and on");
  asked++;
  memset(&commands[asked], 0, sizeof commands[asked]);
  return __real_PQpipelineSync(pg);
}

/* Behind an unlock. */
static bool announces(const struct command *c) {
  bool unlocks = false;
  for (const struct statement *s = c->statements; s < c->statements + c->count; s++) {
    if (unlocks && s->kind == SELECT) return true;
    unlocks = unlocks || s->kind == UNLOCK;
  }
  return false;
}

PGresult *__wrap_PQgetResult(PGconn *pg) {
  PGresult *result = __real_PQgetResult(pg);
  struct command *c = &commands[told];
  if (result == NULL) return NULL;
  open_now.results++;
  trace("  told of command %d: %s %s", told, PQresStatus(PQresultStatus(result)),
        PQresultErrorMessage(result));
  switch (PQresultStatus(result)) {
  case PGRES_PIPELINE_SYNC:
    conclude(told, PQtransactionStatus(pg));
    if (told < asked) told++;
    return result;
  case PGRES_COMMAND_OK:
    c->committed = c->committed || strcmp(PQcmdStatus(result), "COMMIT") == 0;
    break;
  case PGRES_EMPTY_QUERY:
    break;
  case PGRES_TUPLES_OK:
    if (PQntuples(result) == 0 || PQnfields(result) == 0 || (c->has_row && announces(c))) break;
    c->has_row = true;
    c->has_value = !PQgetisnull(result, 0, 0);
    c->length = PQgetlength(result, 0, 0);
    memcpy(c->value, PQgetvalue(result, 0, 0), (size_t)(c->length < MAX_SET ? c->length : MAX_SET));
    break;
  default:
    c->failed = true;
  }
  return result;
}

void __wrap_PQclear(PGresult *result) {
  if (result != NULL) open_now.results--;
  __real_PQclear(result);
}

PGconn *__wrap_PQconnectStartParams(const char *const *keywords, const char *const *values,
                                    int expand) {
  PGconn *pg = __real_PQconnectStartParams(keywords, values, expand);
  if (pg != NULL) open_now.connections++;
  return pg;
}

void __wrap_PQfinish(PGconn *pg) {
  if (pg != NULL) open_now.connections--;
  for (int i = 0; i < known_count; i++) known[i].believed = known[i].late = false;
  told_failed = seems_failed = false;
  __real_PQfinish(pg);
}

PGcancel *__wrap_PQgetCancel(PGconn *pg) {
  PGcancel *cancel = __real_PQgetCancel(pg);
  if (cancel != NULL) open_now.cancels++;
  return cancel;
}

void __wrap_PQfreeCancel(PGcancel *cancel) {
  if (cancel != NULL) open_now.cancels--;
  __real_PQfreeCancel(cancel);
}

/* ---- cancel requests ------------------------------------------------------------------- */

/* Of the only thread that there is: it runs when the program says so. */
static struct {
  void *(*function)(void *);
  void *argument;
} threads[4];

static bool cancel_arrived; /* and has not struck yet */

int __wrap_PQcancel(PGcancel *, char *, int);
int __wrap_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

int __wrap_PQcancel(PGcancel *cancel, char *error, int size) {
  (void)cancel, (void)error, (void)size;
  cancel_arrived = true;
  return 1;
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes,
                          void *(*function)(void *), void *argument) {
  (void)thread, (void)attributes;
  if (threads_refused || thread_count == sizeof threads / sizeof *threads) return EAGAIN;
  threads[thread_count].function = function;
  threads[thread_count++].argument = argument;
  return 0;
}

static void threads_run(void) {
  while (thread_count > 0) {
    thread_count--;
    threads[thread_count].function(threads[thread_count].argument);
  }
}

/* ---- the clock ------------------------------------------------------------------------- */

static double now;

int __wrap_clock_gettime(clockid_t, struct timespec *);

int __wrap_clock_gettime(clockid_t id, struct timespec *t) {
  (void)id;
  t->tv_sec = (time_t)now;
  t->tv_nsec = (long)((now - floor(now)) * 1e9);
  return 0;
}

/* ---- the server's side of the socket --------------------------------------------------- */

static int listener = -1, peer = -1; /* peer -1: closed */
static char host[64];

static struct {
  char bytes[1 << 16];
  size_t length;
} in, out;

static size_t trickle; /* bytes that are delivered at a time; 0: all */
static bool deaf;      /* does not read */

static void hang_up(void) {
  if (peer >= 0) close(peer);
  peer = -1;
  out.length = 0;
}

static void say(const void *bytes, size_t length) {
  if (out.length + length > sizeof out.bytes) return;
  memcpy(out.bytes + out.length, bytes, length);
  out.length += length;
}

static void deliver(size_t most) {
  ssize_t n;
  if (most == 0 || most > out.length) most = out.length;
  if (peer < 0 || most == 0) return;
  n = send(peer, out.bytes, most, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (n < 0) {
    if (errno == EAGAIN) return;
    n = (ssize_t)out.length; /* the client has closed */
  }
  out.length -= (size_t)n;
  memmove(out.bytes, out.bytes + n, out.length);
}

/* Of what the client writes only the Syncs are counted: what it asks is known already. */
static void receive(void) {
  size_t at = 0;
  while (peer >= 0 && !deaf) {
    ssize_t n = recv(peer, in.bytes + in.length, sizeof in.bytes - in.length, MSG_DONTWAIT);
    if (n <= 0) break;
    in.length += (size_t)n;
    for (at = 0; run.connected && in.length - at >= 5;) {
      const unsigned char *m = (const unsigned char *)in.bytes + at;
      size_t length = (size_t)m[1] << 24 | (size_t)m[2] << 16 | (size_t)m[3] << 8 | m[4];
      if (length + 1 > in.length - at) break;
      if (*m == 'S' && received < asked) received++;
      at += length + 1;
    }
    if (!run.connected) at = in.length; /* the startup packet, a password */
    in.length -= at;
    memmove(in.bytes, in.bytes + at, in.length);
    if (in.length == sizeof in.bytes) in.length = 0;
  }
}

/* ---- messages -------------------------------------------------------------------------- */

static char message[4096];
static size_t message_length; /* with the type and the length */

static void message_begin(char type) {
  message[0] = type;
  message_length = 5;
}

static void message_add(const void *bytes, size_t length) {
  if (message_length + length > sizeof message) return;
  memcpy(message + message_length, bytes, length);
  message_length += length;
}

static void message_integer(uint32_t n, int bytes) {
  while (bytes-- > 0) {
    char byte = (char)(n >> 8 * bytes);
    message_add(&byte, 1);
  }
}

static void message_string(const char *text) { message_add(text, strlen(text) + 1); }

/* ---- answers --------------------------------------------------------------------------- */

/* An answer in the making, message by message, so that one of them may be left out. */
static struct {
  char bytes[8192];
  size_t length, begins[64];
  int count;
} answer;

static void message_end(void) {
  uint32_t length = (uint32_t)message_length - 1;
  for (int i = 0; i < 4; i++) message[1 + i] = (char)(length >> (24 - 8 * i));
  if (answer.count == 63 || answer.length + message_length > sizeof answer.bytes) return;
  memcpy(answer.bytes + answer.length, message, message_length);
  answer.begins[answer.count++] = answer.length;
  answer.length += message_length;
}

static void put(char type) {
  message_begin(type);
  message_end();
}

static void put_error(char type, const char *severity, const char *sqlstate) {
  message_begin(type);
  message_string("SERROR");
  message_add("V", 1);
  message_string(severity);
  message_add("C", 1);
  message_string(sqlstate);
  message_string("Mwhat went wrong");
  message_integer(0, 1);
  message_end();
}

static void put_tag(const char *tag) {
  message_begin('C');
  message_string(tag);
  message_end();
}

static void put_description(unsigned oid) {
  message_begin('T');
  message_integer(1, 2);
  message_string("c");
  message_integer(0, 4);
  message_integer(0, 2);
  message_integer(oid, 4);
  message_integer(1, 2);
  message_integer(0xffffffffu, 4);
  message_integer(0, 2);
  message_end();
}

/* NULL: NULL. */
static void put_row(const char *value) {
  message_begin('D');
  message_integer(1, 2);
  message_integer(value != NULL ? (uint32_t)strlen(value) : 0xffffffffu, 4);
  if (value != NULL) message_add(value, strlen(value));
  message_end();
}

/* The whole answer, or without one message of it, or with that one twice; lie 3 is put into it. */
static void answer_say(unsigned lie) {
  int at = answer.count > 0 ? (int)(lie >> 2) % answer.count : 0;
  size_t begin = answer.begins[at], end;
  answer.begins[answer.count] = answer.length;
  end = answer.begins[at + 1];
  if (answer.count == 0) return;
  say(answer.bytes, begin);
  if ((lie & 3) != 1) say(answer.bytes + begin, end - begin);
  if ((lie & 3) == 2) say(answer.bytes + begin, end - begin);
  say(answer.bytes + end, answer.length - end);
  answer.length = 0;
  answer.count = 0;
}

/* ---- the honest server ----------------------------------------------------------------- */

static struct {
  char transaction; /* I, T or E, as ReadyForQuery says */
  bool users; /* the transaction was begun by the user */
  int savepoints;
  char savepoint[MAX_SAVEPOINTS][32]; /* names */
  char prepared[64][32];
  int prepared_count;
  unsigned reached; /* of many keys, how many before the one at which a statement fails */
  const char *lie;  /* a value that is no answer, or NULL */
} server;

enum outcome { /* of the statement about locks */
  SUCCESS,
  REFUSAL,         /* false; the timeout; of others a cancel */
  CANCEL_BEFORE,
  CANCEL_AFTER,    /* it took effect, and yet failed */
  TIMEOUT_AFTER,
  DEADLOCK,
  OUT_OF_LOCKS,
  FAILURE,
  OUTCOMES
};

static bool is_prepared(const char *name) {
  for (int i = 0; i < server.prepared_count; i++)
    if (strcmp(server.prepared[i], name) == 0) return true;
  return false;
}

/* What was taken behind a savepoint and all after it goes, or counts as taken before it. */
static void leave_level(int level, bool keeps) {
  for (struct known *k = known; k < known + known_count; k++)
    for (int i = level; i <= MAX_SAVEPOINTS; i++) {
      if (keeps && level > 0) k->at[level - 1] += k->at[i];
      k->at[i] = 0;
    }
}

/* An error ends what was begun last: the transaction, or all since the last savepoint. */
static bool fail(const char *sqlstate) {
  put_error('E', "ERROR", sqlstate);
  if (server.transaction != 'T') return false;
  server.transaction = 'E';
  leave_level(server.savepoints, false);
  return false;
}

static void end_transaction(void) {
  leave_level(0, false);
  server.transaction = 'I';
  server.users = false;
  server.savepoints = 0;
}

static const char *sqlstate_of(enum outcome outcome) {
  switch (outcome) {
  case CANCEL_BEFORE:
  case CANCEL_AFTER:
    return "57014";
  case DEADLOCK:
    return "40P01";
  case OUT_OF_LOCKS:
    return "53200";
  case FAILURE:
    return "XX000";
  default:
    return "55P03";
  }
}

static bool done(const char *tag) {
  put('n');
  put_tag(tag);
  return true;
}

static bool row(unsigned oid, const char *value) {
  put_description(oid);
  put_row(server.lie != NULL ? server.lie : value);
  put_tag("SELECT 1");
  return true;
}

/* How many keys a statement takes effect on: the error of one undoes nothing of those before. */
static int reach(const struct statement *s, enum outcome outcome) {
  bool all = outcome == SUCCESS || outcome == CANCEL_AFTER || outcome == TIMEOUT_AFTER;
  return all ? s->on.count : (int)server.reached % s->on.count;
}

/* Outside a transaction what has its scope ends with the statement. */
static void take(struct known *k) {
  if (!k->transaction)
    k->held++;
  else if (server.transaction == 'T')
    k->at[server.savepoints]++;
}

/* Each for itself: every other one is refused, or all are, but for those that it has itself. */
static bool answer_each(const struct statement *s, enum outcome outcome) {
  int n = outcome == REFUSAL ? s->on.count : reach(s, outcome);
  char marks[MAX_SET + 1] = "";
  for (int i = 0; i < n; i++) {
    bool refused = outcome == REFUSAL && ((server.reached & 2) || (server.reached & 1) == (i & 1)) &&
                   !is_shown(s->on.keys[i]);
    marks[i] = refused ? 'f' : 't';
    if (!refused) take(s->on.keys[i]);
  }
  return outcome == SUCCESS || outcome == REFUSAL ? row(25, marks) : fail(sqlstate_of(outcome));
}

static bool answer_lock(const struct statement *s, enum outcome outcome) {
  struct known *const *keys = s->on.keys;
  int n = reach(s, outcome);
  bool refused = false;
  if (outcome == REFUSAL) {
    while (n < s->on.count && is_shown(keys[n])) n++; /* its own lock does not hinder it */
    refused = n < s->on.count && s->kind == TRY_LOCK;
    if (n == s->on.count || refused) outcome = SUCCESS;
    if (refused && !keys[0]->transaction) n = 0; /* those before have been let go */
  }
  for (int i = 0; i < n; i++) take(keys[i]);
  if (outcome != SUCCESS) return fail(sqlstate_of(outcome));
  if (refused) return row(16, "f");
  return s->kind == TRY_LOCK || s->array || s->boolean ? row(16, "t") : row(2278, "");
}

static bool answer_unlock(const struct statement *s, enum outcome outcome) {
  bool fails = outcome != SUCCESS && outcome != REFUSAL;
  int n = fails ? reach(s, outcome) : s->on.count;
  char marks[MAX_SET + 1] = "";
  for (int i = 0; i < n; i++) {
    struct known *k = s->on.keys[i];
    marks[i] = (s->kind == LOOK ? is_shown(k) : k->held > 0) ? 't' : 'f';
    if (s->kind == LOOK) continue;
    if (run.honest && s->kind == UNLOCK && k->held == 0)
      finding("the client unlocks what the server has not");
    if (k->held > 0)
      k->held--;
    else if (s->kind == UNLOCK || is_shown(k))
      put_error('N', "WARNING", "01000");
  }
  return fails ? fail("57014") : row(s->array ? 25 : 16, marks);
}

/* The level of the savepoint; 0: there is none of that name. */
static int savepoint_level(const struct statement *s) {
  int level = server.savepoints;
  while (level > 0 && strcmp(server.savepoint[level - 1], s->name) != 0) level--;
  return level;
}

static bool answer_end(const struct statement *s, enum outcome outcome) {
  bool commits = s->kind == COMMIT && server.transaction != 'E';
  if (run.honest && server.users && server.transaction == 'T' && !s->wanted)
    finding("the client ends a transaction of the user's");
  if (run.honest && s->kind == COMMIT && server.transaction == 'T' && !s->commits)
    finding("the client commits, and nobody has said so");
  if (outcome == CANCEL_BEFORE) return fail("57014"); /* it stays open, and has failed */
  if (s->chain && server.transaction == 'I') return fail("25P01");
  if (commits && outcome == FAILURE && server.transaction == 'T') { /* of a deferred constraint */
    end_transaction();
    return fail("23505");
  }
  end_transaction();
  if (s->chain) server.transaction = 'T';
  server.users = s->chain;
  return done(commits ? "COMMIT" : "ROLLBACK");
}

static bool answer_savepoint(const struct statement *s, enum outcome outcome) {
  int level = savepoint_level(s);
  bool ours = strcmp(s->name, "pglocks") == 0;
  if (s->kind == SAVEPOINT) {
    if (server.transaction != 'T') return fail("25P01");
    if (server.savepoints == (ours ? MAX_SAVEPOINTS : MAX_SAVEPOINTS / 2)) return fail("XX000");
    snprintf(server.savepoint[server.savepoints++], 32, "%s", s->name);
    return done("SAVEPOINT");
  }
  if (outcome == CANCEL_BEFORE && s->kind == ROLLBACK_TO) return fail("57014");
  if (run.honest && level == 0 && ours && server.transaction == 'T')
    finding("the client goes back to a savepoint that it has not");
  if (level == 0) return fail("3B001");
  leave_level(level, s->kind == RELEASE_SAVEPOINT);
  server.savepoints = level - (s->kind == RELEASE_SAVEPOINT);
  if (s->kind == RELEASE_SAVEPOINT) return done("RELEASE");
  server.transaction = 'T';
  return done("ROLLBACK");
}

/* False: it failed, and the server skips what follows up to the Sync. `alone`: in its command. */
static bool answer_statement(const struct statement *s, enum outcome outcome, bool alone) {
  if (s->kind == PREPARE) {
    if (is_prepared(s->name)) return fail("42P05");
    if (server.transaction == 'E') return fail("25P02");
    snprintf(server.prepared[server.prepared_count++ % 64], 32, "%s", s->name);
    put('1');
    return true;
  }
  if (s->executes_prepared && !is_prepared(s->name)) return fail("26000");
  if (server.transaction == 'E' && s->kind != ROLLBACK && s->kind != COMMIT &&
      s->kind != ROLLBACK_TO)
    return fail("25P02");
  if (!s->executes_prepared) put('1');
  put('2');
  switch (s->kind) {
  case LOCK:
  case TRY_LOCK:
    return s->each ? answer_each(s, outcome) : answer_lock(s, outcome);
  case UNLOCK:
  case LOOK:
  case GUARD_UNLOCK:
    return answer_unlock(s, outcome);
  case UNLOCK_ALL:
    if (outcome == CANCEL_BEFORE) return fail("57014");
    for (int i = 0; i < known_count; i++) known[i].held = 0;
    return row(2278, "");
  case BEGIN: /* a lock's own comes with the lock */
    if (server.transaction == 'I') server.users = alone;
    server.transaction = 'T';
    return done("BEGIN");
  case COMMIT:
  case ROLLBACK:
    return answer_end(s, outcome);
  case SAVEPOINT:
  case ROLLBACK_TO:
  case RELEASE_SAVEPOINT:
    return answer_savepoint(s, outcome);
  case TOKEN:
    if (outcome == CANCEL_BEFORE || outcome == FAILURE) return fail(sqlstate_of(outcome));
    return row(1700, outcome == REFUSAL ? NULL : "42"); /* NULL: without fsync */
  case NOTHING_AT_ALL:
    put('n');
    put('I');
    return true;
  default:
    if (outcome == CANCEL_BEFORE || outcome == FAILURE) return fail(sqlstate_of(outcome));
    return row(23, "1");
  }
}

static const char *const any_values[] = {"t", "f",  "",   NULL, "true", "T",
                                         "1", "tt", "ft", "tf", "tft",  "ftff"};
enum { ANY_VALUES = sizeof any_values / sizeof *any_values };

/* The oldest command that has arrived, if there is one. */
static bool answer_command(enum outcome outcome, unsigned lie) {
  const struct command *c = &commands[answered];
  char status;
  if (answered >= received) return false;
  answered++;
  server.lie = !run.honest && (lie & 3) == 3 ? any_values[(lie >> 2) % ANY_VALUES] : NULL;
  for (int i = 0; i < c->count && answer_statement(&c->statements[i], outcome, c->count == 1); i++) {}
  message_begin('Z');
  status = server.transaction;
  message_add(&status, 1);
  message_end();
  answer_say(run.honest ? 0 : lie);
  return true;
}

static void handshake(void) {
  static const char key[] = {0, 0, 0, 42, 0, 0, 0, 43};
  message_begin('R');
  message_integer(0, 4);
  message_end();
  message_begin('S');
  message_string("server_version");
  message_string("15.0");
  message_end();
  message_begin('K');
  message_add(key, sizeof key);
  message_end();
  message_begin('Z');
  message_add("I", 1);
  message_end();
  answer_say(0);
}

/* ---- what is said without being asked, or is no answer --------------------------------- */

static void say_notice(unsigned which) {
  static const char *const sqlstates[] = {"00000", "01000", "57014"};
  switch (which % 3) {
  case 0:
    put_error('N', "NOTICE", sqlstates[which / 3 % 3]);
    break;
  case 1:
    message_begin('A');
    message_integer(42, 4);
    message_string("channel");
    message_string("payload");
    message_end();
    break;
  default:
    message_begin('S');
    message_string("in_hot_standby");
    message_string("on");
    message_end();
  }
  answer_say(0);
}

static void say_end(unsigned which) {
  static const struct {
    char type;
    const char *severity, *sqlstate;
  } ends[] = {{'E', "FATAL", "57P01"}, {'N', "WARNING", "57P02"}, {'E', "FATAL", "57P05"},
              {'E', "PANIC", "XX000"}, {'N', "FATAL", "57P01"},   {'E', "FATAL", "25P03"}};
  put_error(ends[which % 6].type, ends[which % 6].severity, ends[which % 6].sqlstate);
  answer_say(0);
  if (which & 8) return; /* the socket stays open for a moment */
  deliver(0);
  hang_up();
}

/* One message of any kind, whether it is its turn or not. */
static void put_any(unsigned which) {
  static const char *const sqlstates[] = {"55P03", "57014", "40P01", "57P01", "25P02", "26000",
                                          "XX000", "53200", "",      "42501", "0A000"};
  static const char types[] = "123nIstcvKZ";
  unsigned more = which / 16;
  switch (which % 16) {
  case 0:
  case 1:
    put_error('E', more & 8 ? "FATAL" : "ERROR", sqlstates[more % 11]);
    break;
  case 2:
    put_row(any_values[more % ANY_VALUES]);
    break;
  case 3:
    put_description(more & 1 ? 16 : 2278);
    break;
  case 4:
    put_tag(more & 1 ? "SELECT 1" : "COMMIT");
    break;
  case 5:
  case 6:
    message_begin('Z');
    message_add(&"ITEx"[more & 3], 1);
    message_end();
    break;
  case 7: /* COPY in, out, both */
    message_begin("GHWG"[more & 3]);
    message_integer(0, 1);
    message_integer(0, 2);
    message_end();
    break;
  case 8: /* authentication: none, cleartext, MD5, SASL and on */
    message_begin('R');
    message_integer("\0\3\5\12\13\14\7\42"[more & 7], 4);
    message_string(more & 8 ? "SCRAM-SHA-256" : "salt");
    message_integer(0, 1);
    message_end();
    break;
  case 9:
    message_begin('D');
    message_integer(more, 2);
    message_end();
    break;
  case 10:
    put_error('N', more & 1 ? "FATAL" : "WARNING", sqlstates[more % 11]);
    break;
  case 11:
    message_begin('T');
    message_integer(0, 2);
    message_end();
    break;
  default:
    put(types[more % (sizeof types - 1)]);
  }
}

/* With another length than it has. */
static void say_any_wrong(unsigned which, unsigned length) {
  static const uint32_t lengths[] = {0, 1, 3, 4, 5, 255, 65536, 0x3fffffff, 0x7fffffff, 0xffffffff};
  uint32_t n;
  put_any(which);
  n = lengths[length % 10];
  for (int i = 0; i < 4 && answer.length >= 5; i++) answer.bytes[1 + i] = (char)(n >> (24 - 8 * i));
  answer_say(0);
}

static void say_raw(unsigned n) {
  size_t length = n % 16;
  if (length > (size_t)(input_end - input)) length = (size_t)(input_end - input);
  say(input, length);
  input += length;
}

/* ---- calls of the client --------------------------------------------------------------- */

static void wait_for_server(double seconds);

static bool is_ready_now(int fd, short events) {
  struct pollfd p = {fd, events, 0};
  return poll(&p, 1, 0) > 0;
}

static int steps; /* of a call that blocks, since it waited last */

/* A call that blocks has something to do. */
static int go_on(int ready) {
  if (++steps > MAX_TURNS) finding("a call does not end");
  return ready;
}

/* It has not: others may do something meanwhile. */
static void block(double seconds) {
  lua_State *caller = L;
  steps = 0;
  L = meanwhile;
  run.blocks = true;
  wait_for_server(seconds);
  run.blocks = false;
  L = caller;
}

int __wrap_ppoll(struct pollfd *, nfds_t, const struct timespec *, const sigset_t *);

int __wrap_ppoll(struct pollfd *fds, nfds_t n, const struct timespec *limit, const sigset_t *mask) {
  (void)mask;
  if (poll(fds, n, 0) > 0) return go_on(1);
  block(limit != NULL ? (double)limit->tv_sec + (double)limit->tv_nsec * 1e-9 : HUGE_VAL);
  return poll(fds, n, 0);
}

/* The timer that ends epoll_wait. */
static struct {
  int fd;
  double strikes;
} timer;

int __wrap_timerfd_settime(int, int, const struct itimerspec *, struct itimerspec *);

int __wrap_timerfd_settime(int fd, int flags, const struct itimerspec *at, struct itimerspec *old) {
  (void)flags;
  (void)old;
  timer.fd = fd;
  timer.strikes = (double)at->it_value.tv_sec + (double)at->it_value.tv_nsec * 1e-9;
  return 0;
}

int __real_epoll_wait(int, struct epoll_event *, int, int);
int __wrap_epoll_wait(int, struct epoll_event *, int, int);

int __wrap_epoll_wait(int epoll, struct epoll_event *events, int most, int milliseconds) {
  int ready = __real_epoll_wait(epoll, events, most, 0);
  (void)milliseconds;
  if (ready > 0) return go_on(ready);
  block(timer.strikes - now);
  ready = __real_epoll_wait(epoll, events, most, 0);
  if (ready == 0 && now >= timer.strikes) events[ready++].data.fd = timer.fd;
  return ready;
}

/* Calls the function that lies before `arguments` values, and leaves its results: none after an
 * error, whose code is returned. */
static const char *call(const char *where, int arguments) {
  int base = lua_gettop(L) - arguments;
  const char *code;
  bool no_memory;
  trace(" %s", where);
  if (lua_pcall(L, arguments, LUA_MULTRET, 0) == LUA_OK) {
    trace(" %s has returned", where);
    return NULL;
  }
  no_memory = memory_failed && lua_type(L, -1) == LUA_TSTRING &&
              strcmp(lua_tostring(L, -1), "not enough memory") == 0;
  code = harness_error(L, where, !no_memory);
  trace(" %s has raised %s", where, *code ? code : lua_tostring(L, -1));
  /* Only check() says so of a lock that the client has released itself. */
  if (run.honest && strcmp(code, "not_held") == 0 && strcmp(where, "check") != 0)
    finding("%s says that the server did not hold a lock", where);
  lua_settop(L, base - 1);
  return code;
}

/* The same of what may end the user's transaction. */
static const char *call_ending(const char *where, int arguments) {
  bool before = may_end;
  const char *code;
  may_end = true;
  code = call(where, arguments);
  may_end = before;
  return code;
}

/* Pushes a function of the core, with the connection as its first argument. */
static void push_call(int table, const char *name) {
  lua_getfield(L, table, name);
  lua_pushvalue(L, CONNECTION);
}

static struct known *known_key(int key, bool shared, bool transaction) {
  lua_Integer classid, objid, objsubid;
  lua_getfield(L, key, "classid");
  lua_getfield(L, key, "objid");
  lua_getfield(L, key, "objsubid");
  classid = lua_tointeger(L, -3);
  objid = lua_tointeger(L, -2);
  objsubid = lua_tointeger(L, -1);
  lua_pop(L, 3);
  return know((uint32_t)classid, (uint32_t)objid, (int)objsubid, shared, transaction);
}

/* Between these two nothing is collected, which would let go of what is just looked at. */
static int kept;

static void keep_garbage(void) {
  if (kept++ == 0) lua_gc(L, LUA_GCSTOP);
}

static void collect_garbage(void) {
  if (--kept == 0) lua_gc(L, LUA_GCRESTART);
}

/* The client has heard all that there is to hear, and is at nothing. */
static bool is_settled(void) { return !run.busy && told == asked && peer >= 0; }

static void must_be_held(const char *who, const struct known *k) {
  const char *why = !k->believed                                                ? "was not granted"
                    : k->disproved && !run.busy                                 ? "is not there"
                    : k->transaction && ended >= told && ended >= k->wanted && !run.busy
                        ? "is to end"
                    : k->transaction && told_failed && is_settled()             ? "has failed"
                    : run.honest && is_settled() && counted(k) == 0 ? "the server has not"
                                                                                : NULL;
  if (why != NULL)
    finding("%s says held of a lock that %s: %u %u %d%s%s", who, why, k->classid, k->objid,
            k->objsubid, k->shared ? " shared" : "", k->transaction ? " of the transaction" : "");
}

static void all_must_be_held(const char *who, const struct set *set) {
  for (int i = 0; i < set->count; i++) must_be_held(who, set->keys[i]);
}

/* The keys of the lock at the top. */
static struct set known_lock(void) {
  struct set set = {.count = 0};
  bool shared, transaction;
  int keys = lua_gettop(L) + 1;
  lua_getfield(L, -1, "keys");
  lua_getfield(L, -2, "shared");
  shared = lua_toboolean(L, -1);
  lua_getfield(L, -3, "scope");
  transaction = strcmp(lua_tostring(L, -1), "transaction") == 0;
  for (int i = 1; i <= (int)lua_rawlen(L, keys); i++) {
    lua_rawgeti(L, keys, i);
    add(&set, known_key(lua_gettop(L), shared, transaction));
  }
  if (set.count == 0) finding("a lock without keys");
  lua_settop(L, keys - 1);
  return set;
}

/* True if it says so; the lock at the top is popped. */
static bool ask_held(void) {
  struct set set = known_lock();
  bool held;
  lua_getfield(L, LOCK_METHODS, "held");
  lua_insert(L, -2);
  if (call("held", 1) != NULL) finding("held raises");
  held = lua_toboolean(L, -1);
  lua_pop(L, 1);
  if (held) {
    all_must_be_held("held()", &set);
    if (peer < 0 && !run.busy) finding("held() is true after the end of the session");
  }
  return held;
}

/* Of the options that the program asks for. */
static bool joins(unsigned slot) { return slot & 8; }

static bool draws(unsigned slot) { return !joins(slot) && slot & 16; }

/* Of what a call that acquires returned: a lock, or nil. True: one that is acquired. */
static bool take_lock(bool attempt, unsigned slot) {
  bool acquired;
  if (lua_gettop(L) <= TOP || lua_isnil(L, TOP + 1)) {
    if (attempt) finding("attempt returns no lock");
    return false;
  }
  lua_settop(L, TOP + 1);
  lua_getfield(L, -1, "acquired");
  acquired = lua_toboolean(L, -1);
  lua_pop(L, 1);
  if (acquired) { /* without a collection meanwhile, which may end its transaction */
    struct set set;
    keep_garbage();
    set = known_lock();
    all_must_be_held("an acquire", &set);
    collect_garbage();
    lua_getfield(L, -1, "token");
    if (lua_isnil(L, -1) != !draws(slot)) finding("a lock without its token, or with one of its own");
    lua_pop(L, 1);
  } else if (!attempt)
    finding("a lock that is not acquired");
  lua_rawseti(L, LOCKS, (int)(slot % MAX_LOCKS) + 1);
  return acquired;
}

/* After which nothing is locked, for certain. */
static bool is_refusal(const char *code) {
  static const char *const codes[] = {"timeout", "interrupted", "deadlock", "too_many_locks"};
  for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
    if (strcmp(code, codes[i]) == 0) return true;
  return false;
}

/* The last word about every key that was asked for since command `since` must be that it is not
 * held. */
static void must_be_denied(const char *who, const char *code, int since) {
  bool any = false;
  if (run.tried >= since) return; /* on_end has tried a key meanwhile */
  for (int i = since; i < asked; i++) any = any || commands[i].statements[0].kind == TOKEN ||
                                            (commands[i].count > 1 && commands[i].statements[1].kind == TOKEN);
  for (const struct known *k = known; k < known + known_count; k++) {
    int denied = k->denied;
    if (k->transaction) {
      if (denied < ended) denied = ended;
      if (denied < idle) denied = idle;
      if (denied < gone_back) denied = gone_back;
      if (strcmp(code, "interrupted") == 0) denied = k->wanted; /* may stay */
    }
    any = any || denied >= since;
    if (k->wanted >= since && denied < k->wanted)
      finding("%s says refused of a lock that was not denied: %u %u %d%s", who, k->classid,
              k->objid, k->objsubid, k->shared ? " shared" : "");
  }
  if (!any) finding("%s says refused, and nothing was denied", who);
}

/* Drives what was begun to its end. */
static void drive(void) {
  for (int turns = 0;; turns++) {
    const char *events;
    int fd;
    double seconds;
    short wanted;
    if (turns > MAX_TURNS) finding("an operation does not end");
    push_call(CORE, "step");
    if (call("step", 1) != NULL) finding("step raises");
    if (lua_gettop(L) == TOP) break;
    events = lua_tostring(L, TOP + 1);
    fd = (int)lua_tointeger(L, TOP + 2);
    seconds = lua_tonumber(L, TOP + 3);
    wanted = (short)((strchr(events, 'r') ? POLLIN : 0) | (strchr(events, 'w') ? POLLOUT : 0));
    lua_settop(L, TOP);
    if (!(seconds >= 0)) finding("step has %g seconds left", seconds);
    if (!is_ready_now(fd, wanted)) wait_for_server(seconds);
  }
}

/* The operation that `start` began, to its results. Inside another it must have been refused. */
static const char *complete(const char *name, const char *begun) {
  const char *code;
  lua_settop(L, TOP);
  if (run.busy) {
    if (begun == NULL) finding("%s is begun inside another operation", name);
    return "busy_connection";
  }
  if (begun != NULL) return begun;
  run.busy = true;
  run.abandoned = false;
  drive();
  run.busy = false;
  if (run.abandoned) return "abandoned";
  push_call(CORE, "finish");
  code = call(name, 1);
  return code;
}

static void push_key(unsigned which) {
  switch (which % 4) {
  case 0:
    lua_pushinteger(L, 1);
    break;
  case 1:
    lua_pushliteral(L, "a name\0 '*/");
    break;
  case 2:
    lua_createtable(L, 2, 0);
    for (int i = 1; i <= 2; i++) {
      lua_pushinteger(L, i - 1);
      lua_rawseti(L, -2, i);
    }
    break;
  default:
    lua_pushinteger(L, -1);
  }
}

/* A list of the keys whose bits are set, not in the order in which they are locked; without a bit,
 * of one key, twice. */
static void push_keys(unsigned which) {
  lua_createtable(L, MAX_SET, 0);
  for (unsigned i = 0; i < MAX_SET; i++)
    if (which >> i & 1 || (which == 0 && i < 2)) {
      push_key(which == 0 ? 0 : i);
      lua_rawseti(L, -2, (int)lua_rawlen(L, -2) + 1);
    }
}

static void push_options(unsigned what, unsigned slot) {
  static const double timeouts[] = {0, 0.5, 1000};
  lua_createtable(L, 0, 3);
  lua_pushboolean(L, (what & 1) != 0);
  lua_setfield(L, -2, "shared");
  if ((what >> 1 & 3) != 0) {
    lua_pushnumber(L, timeouts[(what >> 1 & 3) - 1]);
    lua_setfield(L, -2, "timeout");
  }
  lua_pushboolean(L, (what & 8) != 0);
  lua_setfield(L, -2, "comment");
  lua_pushstring(L, joins(slot) ? "transaction" : "session");
  lua_setfield(L, -2, "scope");
  lua_pushboolean(L, draws(slot));
  lua_setfield(L, -2, "token");
}

static void acquire(const char *verb, unsigned what) {
  unsigned slot = input_byte();
  bool attempt = strcmp(verb, "attempt") == 0, blocks = slot & 64 && !run.scheduled;
  bool many = slot & 32 && !attempt;
  int since = asked;
  char name[16];
  const char *code;
  snprintf(name, sizeof name, "%s%s", verb, many ? "_all" : "");
  push_call(!blocks ? START : attempt ? CORE : CONNECTION_METHODS, name);
  if (many) push_keys(what >> 4);
  else push_key(what >> 4);
  push_options(what, slot);
  if (blocks) {
    bool was_busy = run.busy;
    run.busy = true;
    code = call(name, 3);
    run.busy = was_busy;
    if (code == NULL && was_busy) finding("%s goes on inside another operation", name);
  } else
    code = complete(name, call(name, 3));
  if (code != NULL ? is_refusal(code) : !take_lock(attempt, slot))
    must_be_denied(name, code != NULL ? code : "timeout", since);
  lua_settop(L, TOP);
}

/* Pushes a lock that the program has; false: that one it has not. */
static bool push_lock(unsigned slot) {
  lua_rawgeti(L, LOCKS, (int)(slot % MAX_LOCKS) + 1);
  if (!lua_isnil(L, -1)) return true;
  lua_settop(L, TOP);
  return false;
}

/* What was begun since that command was to COMMIT, and has returned true. */
static void must_be_committed(const char *who, int since) {
  if (run.commits_deferred) return;
  for (int i = since; i < told; i++)
    if (commands[i].committed && !commands[i].failed) return;
  finding("%s returns true, and nothing was committed", who);
}

static void release(unsigned slot) {
  int since = asked;
  bool transaction, was_busy = run.busy, blocks = slot & 64 && !run.scheduled;
  const char *code;
  if (!push_lock(slot)) return;
  lua_getfield(L, -1, "scope");
  transaction = strcmp(lua_tostring(L, -1), "transaction") == 0;
  lua_pop(L, 1);
  lua_getfield(L, blocks ? LOCK_METHODS : START, "release");
  lua_insert(L, -2);
  may_commit = true;
  if (blocks) {
    run.busy = true;
    code = call("release", 1);
    run.busy = was_busy;
  } else {
    code = call("release", 1);
    may_commit = false;
    code = complete("release", code);
  }
  may_commit = false;
  if (transaction && code == NULL && lua_gettop(L) == TOP + 1 && lua_toboolean(L, TOP + 1))
    must_be_committed("release", since);
  lua_settop(L, TOP);
}

static void check(unsigned slot) {
  struct set set;
  if (!push_lock(slot)) return;
  set = known_lock();
  lua_getfield(L, START, "check");
  lua_insert(L, -2);
  if (complete("check", call("check", 1)) == NULL) all_must_be_held("check()", &set);
  lua_settop(L, TOP);
}

static const char *ping(void) {
  const char *code;
  push_call(START, "ping");
  code = complete("ping", call("ping", 1));
  lua_settop(L, TOP);
  return code;
}

/* The ends of conn:transaction. */
static void transact(bool commits) {
  const char *name = commits ? "commit" : "begin";
  int since = asked;
  push_call(START, name);
  if (complete(name, call_ending(name, 1)) == NULL && commits) must_be_committed(name, since);
  lua_settop(L, TOP);
}

static void query(unsigned what) {
  static const char *const sql[] = {
      "BEGIN",          "SELECT 1",        "COMMIT",      "ROLLBACK",
      "SELECT 2",       "BEGIN",           "SELECT 3",    "long",
      "SAVEPOINT a",    "ROLLBACK TO a",   "SAVEPOINT b", "ROLLBACK TO b",
      "RELEASE a",      "ROLLBACK AND CHAIN", "RELEASE b",   "COMMIT AND CHAIN"};
  const char *text = sql[what % 8 + (what & 32 ? 8 : 0)];
  const char *name = what & 8 ? "execute" : "query";
  if (what & 64) {
    transact(what & 1);
    return;
  }
  push_call(START, name);
  if (what & 8) what & 16 ? lua_pushnumber(L, -1) : lua_pushnil(L);
  if (strcmp(text, "long") == 0) {
    luaL_Buffer buffer;
    memset(luaL_buffinitsize(L, &buffer, 40000), ' ', 40000);
    luaL_pushresultsize(&buffer, 40000);
  } else
    lua_pushstring(L, text);
  complete(name, call_ending(name, what & 8 ? 3 : 2));
  lua_settop(L, TOP);
}

/* What is listed, of the known locks. Without a collection meanwhile, which would let go of what has
 * just been listed. */
static const bool *locks(void) {
  static bool listed[MAX_KEYS];
  memset(listed, 0, sizeof listed);
  keep_garbage();
  push_call(CONNECTION_METHODS, "locks");
  if (call("locks", 1) != NULL) finding("locks raises");
  for (int i = 1; i <= (int)lua_rawlen(L, TOP + 1); i++) {
    struct known *k;
    lua_rawgeti(L, TOP + 1, i);
    lua_getfield(L, -1, "mode");
    lua_getfield(L, -2, "scope");
    lua_getfield(L, -3, "key");
    k = known_key(lua_gettop(L), strcmp(lua_tostring(L, -3), "shared") == 0,
                  strcmp(lua_tostring(L, -2), "transaction") == 0);
    must_be_held("locks()", k);
    listed[k - known] = true;
    lua_settop(L, TOP + 1);
  }
  lua_settop(L, TOP);
  collect_garbage();
  return listed;
}

static void scope_end(int index) {
  bool was_busy = run.busy;
  luaL_getmetafield(L, index, "__close");
  lua_pushvalue(L, index);
  lua_pushnil(L);
  run.busy = true;
  if ((index == CONNECTION ? call_ending : call)("__close", 2) != NULL) finding("__close raises");
  run.busy = was_busy;
  lua_settop(L, TOP);
}

/* What ends a coroutine that waits: nobody drives its operation any more. */
static void abandon(void) {
  run.abandoned = true;
  lua_getfield(L, CORE, "waiter");
  call("waiter", 0);
  lua_getfield(L, CORE, "await");
  lua_pushvalue(L, TOP + 1);
  lua_pushvalue(L, CONNECTION);
  call("await", 2);
  scope_end(TOP + 1);
}

static void configure(const char *option, bool value) {
  push_call(CORE, "configure");
  lua_createtable(L, 0, 1);
  lua_pushboolean(L, value);
  lua_setfield(L, -2, option);
  call("configure", 2);
  lua_settop(L, TOP);
}

static void close_connection(void) {
  push_call(START, "close");
  complete("close", call_ending("close", 1));
  lua_settop(L, TOP);
}

/* Calls without arguments that neither wait nor may fail. */
static void call_simple(int table, const char *name) {
  push_call(table, name);
  if (call_ending(name, 1) != NULL) finding("%s raises", name);
  lua_settop(L, TOP);
}

/* ---- many owners on one connection ------------------------------------------------------ */

/* What such a one calls is not waited for, and refuses nothing. */
static bool ask_core(const char *name, int arguments) {
  if (call(name, arguments) != NULL) finding("%s raises", name);
  return lua_toboolean(L, -1);
}

static bool is_true(const char *name) {
  bool result;
  push_call(CORE, name);
  result = ask_core(name, 1);
  lua_settop(L, TOP);
  return result;
}

static bool is_alive(void) {
  bool alive;
  push_call(CONNECTION_METHODS, "alive");
  alive = ask_core("alive", 1);
  lua_settop(L, TOP);
  return alive;
}

/* A lock of no connection yet, to the top. */
static void push_closed(unsigned which, bool shared) {
  int top = lua_gettop(L);
  lua_getfield(L, CORE, "closed_lock");
  push_key(which);
  lua_createtable(L, 0, 1);
  lua_pushboolean(L, shared);
  lua_setfield(L, -2, "shared");
  ask_core("closed_lock", 2);
  lua_settop(L, top + 1);
}

/* How often the lock at the top, which has joined another, was told to end; -1: it has not joined. */
static int times_told(void) {
  int times;
  lua_getfield(L, LUA_REGISTRYINDEX, "fuzz joined");
  lua_pushvalue(L, -2);
  lua_rawget(L, -2);
  times = lua_isnil(L, -1) ? -1 : (int)lua_tointeger(L, -1);
  lua_pop(L, 2);
  return times;
}

static void set_times_told(int times) {
  lua_getfield(L, LUA_REGISTRYINDEX, "fuzz joined");
  lua_pushvalue(L, -2);
  lua_pushinteger(L, times);
  lua_rawset(L, -3);
  lua_pop(L, 1);
}

static bool is_unlisted(unsigned which, bool shared) {
  const bool *listed = locks();
  push_key(which);
  lua_getfield(L, CORE, "key");
  lua_insert(L, -2);
  ask_core("key", 1);
  which = (unsigned)(known_key(TOP + 1, shared, false) - known);
  lua_settop(L, TOP);
  return !listed[which];
}

/* One more lock on what is held: into the slot. Not more than is held, and not less. */
static void join(unsigned which, bool shared, unsigned slot, bool binds) {
  keep_garbage();
  push_closed(which, shared);
  push_call(CORE, "join");
  lua_pushvalue(L, TOP + 1);
  if (ask_core("join", 2)) {
    struct set set;
    lua_settop(L, TOP + 1);
    set_times_told(0);
    set = known_lock();
    all_must_be_held("join()", &set);
    lua_rawseti(L, LOCKS, (int)(slot % MAX_LOCKS) + 1);
  } else {
    lua_settop(L, TOP + 1);
    if (binds) {
      push_call(CORE, "bind");
      lua_pushvalue(L, TOP + 1);
      ask_core("bind", 2);
      lua_settop(L, TOP + 1);
      lua_rawseti(L, LOCKS, (int)(slot % MAX_LOCKS) + 1);
    }
    lua_settop(L, TOP);
    if (is_alive() && !is_unlisted(which, shared)) finding("join() finds nothing of what is listed");
  }
  lua_settop(L, TOP);
  collect_garbage();
}

/* Lets go of the lock at that place of the list. */
static void let_go(int place, bool late) {
  bool before[MAX_KEYS], notes = late && is_true("is_idle") && told == asked && !seems_failed;
  const bool *after;
  int since = asked;
  keep_garbage();
  if (notes) memcpy(before, locks(), sizeof before);
  lua_getfield(L, CORE, "let_go");
  lua_rawgeti(L, LOCKS, place);
  lua_pushboolean(L, late);
  ask_core("let_go", 2);
  lua_settop(L, TOP);
  lua_rawgeti(L, LOCKS, place);
  if (ask_held()) finding("held() is true after let_go()");
  after = notes ? locks() : NULL;
  for (int i = 0; notes && i < known_count && peer >= 0 && is_alive(); i++)
    if (!known[i].transaction && before[i] && !after[i] && known[i].given_up < since) known[i].late = true;
  collect_garbage();
}

static void send_late(void) {
  push_call(CORE, "send_late");
  ask_core("send_late", 1);
  lua_settop(L, TOP);
  for (int i = 0; i < known_count; i++)
    if (known[i].late) finding("send_late() has not sent a release");
}

/* Those that were got, for others to join; in the bits after the four keys: their mode, whether others
 * join, and whether it is let go, perhaps later. */
static void try_each(unsigned what, unsigned slot) {
  bool shared = what & 16;
  int since = asked;
  const char *code;
  const bool *listed;
  lua_createtable(L, MAX_SET, 0);
  for (unsigned i = 0; i < MAX_SET; i++)
    if (what >> i & 1 || ((what & 15) == 0 && i < 2)) {
      push_closed((what & 15) == 0 ? 0 : i, shared);
      lua_rawseti(L, TOP + 1, (int)lua_rawlen(L, TOP + 1) + 1);
    }
  push_call(START, "try_each");
  lua_pushvalue(L, TOP + 1);
  code = complete("try_each", call("try_each", 2));
  if (code != NULL) {
    if (is_refusal(code)) must_be_denied("try_each", code, since);
    lua_settop(L, TOP);
    return;
  }
  keep_garbage();
  if (lua_gettop(L) > TOP + 1) { /* the statement has failed, be it after some */
    lua_settop(L, TOP + 2);
    harness_error(L, "try_each", true);
  }
  lua_settop(L, TOP + 1);
  lua_rawseti(L, LOCKS, MAX_LOCKS + 2);
  if (is_alive()) {
    listed = locks();
    for (int i = 0; i < known_count; i++)
      if (!listed[i] && known[i].wanted >= since && known[i].denied < known[i].wanted &&
          known[i].given_up < known[i].wanted)
        finding("try_each has not got a lock that was not denied");
  }
  for (unsigned i = 0; what & 32 && i < MAX_SET; i++)
    if (what >> i & 1) join(i, shared, slot + i, false);
  if (what & 64)
    let_go(MAX_LOCKS + 2, what & 128);
  else {
    lua_rawgeti(L, LOCKS, MAX_LOCKS + 2);
    lua_rawseti(L, LOCKS, (int)(slot % MAX_LOCKS) + 1);
  }
  lua_pushnil(L);
  lua_rawseti(L, LOCKS, MAX_LOCKS + 2);
  collect_garbage();
}

/* What says of one lock that it is held, be it just for its key. */
static void ask_standing(const char *name, unsigned slot) {
  struct set set;
  if (!push_lock(slot)) return;
  keep_garbage();
  set = known_lock();
  lua_getfield(L, CORE, name);
  lua_insert(L, -2);
  if (call(name, 1) == NULL && lua_gettop(L) > TOP && !set.keys[0]->transaction)
    all_must_be_held(name, &set);
  lua_settop(L, TOP);
  collect_garbage();
}

/* What the client neither holds nor lets go the server has not. */
static void nothing_must_stay(void) {
  const bool *listed;
  bool leaves[MAX_SET];
  keep_garbage();
  for (unsigned i = 0; i < MAX_SET; i++) {
    push_call(CORE, "leaves");
    push_closed(i, false);
    leaves[i] = ask_core("leaves", 2);
    lua_settop(L, TOP);
  }
  listed = locks();
  for (unsigned i = 0; i < MAX_SET && run.honest && is_settled() && is_alive(); i++)
    for (int shared = 0; shared < 2; shared++) {
      struct set set;
      push_closed(i, shared);
      set = known_lock();
      lua_settop(L, TOP);
      if (!leaves[i] && !listed[set.keys[0] - known] && set.keys[0]->held > 0)
        finding("a lock is left that the client knows nothing of");
    }
  collect_garbage();
}

/* Two locks on the same keys change their modes. */
static void exchange(unsigned slot, unsigned other) {
  struct set a, b;
  bool same;
  if (!push_lock(slot)) return;
  if (!push_lock(other)) return;
  keep_garbage();
  b = known_lock();
  lua_pushvalue(L, TOP + 1);
  a = known_lock();
  lua_pop(L, 1);
  same = a.count == b.count;
  for (int i = 0; same && i < a.count; i++)
    same = a.keys[i]->classid == b.keys[i]->classid && a.keys[i]->objid == b.keys[i]->objid &&
           a.keys[i]->objsubid == b.keys[i]->objsubid && !a.keys[i]->transaction && !b.keys[i]->transaction;
  if (same) {
    lua_getfield(L, CORE, "exchange");
    lua_insert(L, TOP + 1);
    call("exchange", 2);
  }
  lua_settop(L, TOP);
  collect_garbage();
}

enum { LET_GO, LET_GO_LATE, HAND_ON, RAISE, CLOSE, TRY, CLOSE_LOCK, DO_NOTHING, AT_END };

/* As the owner of locks that have joined others does when the scope of one ends; and as he should not. */
/* Each lock that is let go was held, as far as PostgreSQL is concerned. */
static int on_lost(lua_State *caller) {
  lua_getfield(caller, 2, "code");
  if (run.honest && strcmp(lua_tostring(caller, -1), "not_held") == 0)
    finding("on_lost is told that the server did not hold a lock");
  return 0;
}

static int on_end(lua_State *caller) {
  lua_State *before = L;
  struct set set;
  int told_before;
  bool was_busy = run.busy;
  L = caller;
  lua_settop(L, 2);
  told_before = times_told();
  if (told_before < 0) finding("on_end is told of a lock that has not joined another one");
  if (told_before > 0) finding("on_end is told twice of a lock");
  set_times_told(1);
  if (run.ends) {
    L = before;
    return 0;
  }
  run.ends = true;
  L = ending;
  lua_settop(L, TOP);
  lua_xmove(caller, L, 1);
  keep_garbage();
  lua_pushvalue(L, TOP + 1);
  lua_rawseti(L, LOCKS, MAX_LOCKS + 1);
  set = known_lock();
  all_must_be_held("on_end", &set);
  lua_getfield(L, CORE, "identity");
  lua_insert(L, TOP + 1);
  ask_core("identity", 1);
  if (lua_gettop(L) == TOP) finding("on_end is told of a lock that is not held");
  lua_settop(L, TOP);
  collect_garbage();
  switch (run.at_end % AT_END) {
  case LET_GO:
    let_go(MAX_LOCKS + 1, false);
    break;
  case HAND_ON:
    if (run.handed_on++ < MAX_LOCKS) /* it may replace one whose end is told next */
      for (unsigned i = 0; i < MAX_SET; i++) join(i, set.keys[0]->shared, run.at_end / AT_END + i, false);
    /* fall through */
  case LET_GO_LATE:
    let_go(MAX_LOCKS + 1, true);
    break;
  case CLOSE:
    scope_end(CONNECTION);
    break;
  case TRY:
    run.tried = asked;
    run.busy = true;
    push_call(CONNECTION_METHODS, "try_lock");
    push_key(run.at_end / AT_END);
    if (call("try_lock", 2) == NULL && lua_gettop(L) > TOP) {
      lua_settop(L, TOP + 1);
      lua_rawseti(L, LOCKS, MAX_LOCKS);
    }
    run.busy = was_busy;
    break;
  case CLOSE_LOCK:
    lua_rawgeti(L, LOCKS, MAX_LOCKS + 1);
    scope_end(TOP + 1);
    break;
  default:
    break;
  }
  lua_settop(L, TOP);
  lua_pushnil(L);
  lua_rawseti(L, LOCKS, MAX_LOCKS + 1);
  L = before;
  run.ends = false;
  return run.at_end % AT_END == RAISE ? luaL_error(caller, "raised by on_end") : 0;
}

/* The end of a scope is told, if it is that of a lock that has joined another one and is held. */
static void lock_end(unsigned slot) {
  bool is_to_be_told;
  int kept_by;
  if (!push_lock(slot)) return;
  keep_garbage();
  is_to_be_told = times_told() == 0;
  lua_getfield(L, CORE, "identity");
  lua_pushvalue(L, TOP + 1);
  ask_core("identity", 1);
  is_to_be_told = is_to_be_told && lua_gettop(L) > TOP + 1;
  lua_settop(L, TOP + 1);
  lua_pushvalue(L, TOP + 1);
  kept_by = luaL_ref(L, LUA_REGISTRYINDEX);
  collect_garbage();
  scope_end(TOP + 1);
  lua_rawgeti(L, LUA_REGISTRYINDEX, kept_by);
  if (is_to_be_told && times_told() == 0) finding("on_end is not told of the end of a lock");
  luaL_unref(L, LUA_REGISTRYINDEX, kept_by);
  lua_settop(L, TOP);
}

static void owners_instruct(unsigned op) {
  trace("%u of many owners at %.3f s", op, now);
  switch (op) {
  case 0:
  case 1: {
    unsigned what = input_byte();
    try_each(what, input_byte());
    break;
  }
  case 2:
  case 3: {
    unsigned what = input_byte();
    join(what, what & 8, what >> 5, what & 16);
    break;
  }
  case 4:
  case 5: {
    unsigned what = input_byte();
    if (!push_lock(what)) break;
    lua_settop(L, TOP);
    let_go((int)(what % MAX_LOCKS) + 1, what & 8);
    break;
  }
  case 6: /* many in a row */
    for (unsigned slot = 0; slot < MAX_LOCKS; slot++) {
      if (!push_lock(slot)) continue;
      lua_settop(L, TOP);
      let_go((int)slot + 1, true);
    }
    break;
  case 7:
    send_late();
    break;
  case 8:
    ask_standing("standing", input_byte());
    break;
  case 9:
    ask_standing("identity", input_byte());
    break;
  case 10:
    nothing_must_stay();
    break;
  case 11: {
    unsigned slots = input_byte();
    exchange(slots, slots / MAX_LOCKS);
    break;
  }
  case 12:
    run.at_end = input_byte();
    break;
  case 13:
    for (unsigned slot = 0; slot < MAX_LOCKS; slot++) lock_end(slot);
    break;
  case 14:
    lock_end(input_byte());
    break;
  case 15:
    fails_in = input_byte() % 8;
    break;
  }
}

/* ---- the program ----------------------------------------------------------------------- */

static enum outcome input_outcome(void) {
  unsigned n = input_byte();
  server.reached = n >> 3 & 3;
  return cancel_arrived && n & 64 ? CANCEL_BEFORE : (enum outcome)(n % OUTCOMES);
}

/* One instruction: of the client, or of the server. */
static void instruct(void) {
  unsigned op = input_byte();
  if (op >= 240) {
    owners_instruct(op - 240);
    return;
  }
  op %= 40;
  if (run.honest && op >= 36) op -= 6;
  trace("%u at %.3f s", op, now);
  switch (op) {
  case 0:
  case 1:
    acquire("lock", input_byte());
    break;
  case 2:
    acquire("try_lock", input_byte());
    break;
  case 3:
    acquire("attempt", input_byte());
    break;
  case 4:
  case 5:
    release(input_byte());
    break;
  case 6:
    check(input_byte());
    break;
  case 7:
    ping();
    break;
  case 8:
  case 9:
    query(input_byte());
    break;
  case 10:
    if (push_lock(input_byte())) ask_held();
    break;
  case 11:
    call_simple(CONNECTION_METHODS, "alive");
    break;
  case 12:
    locks();
    break;
  case 13:
    call_simple(CONNECTION_METHODS, "cancel");
    break;
  case 14:
    lock_end(input_byte());
    break;
  case 15: /* collected, unless there is another reference */
    lua_pushnil(L);
    lua_rawseti(L, LOCKS, (int)(input_byte() % MAX_LOCKS) + 1);
    lua_gc(L, LUA_GCCOLLECT);
    break;
  case 16:
    close_connection();
    break;
  case 17:
    scope_end(CONNECTION);
    break;
  case 18:
    call_simple(CORE, "rollback");
    break;
  case 19: {
    unsigned what = input_byte();
    configure("deferred", what & 1);
    run.commits_deferred = run.commits_deferred || (what & 2);
    if (what & 2) configure("commits_deferred", what & 4);
    break;
  }
  case 20:
    if (run.busy && !run.blocks) abandon();
    break;
  case 21: /* somebody drops the prepared statements */
    server.prepared_count = 0;
    break;
  case 22:
    now += (double[]){0.001, 0.4, 1, 9, 20, 2000}[input_byte() % 6];
    break;
  case 23:
    threads_run();
    break;
  case 24:
    threads_refused = !threads_refused;
    break;
  case 25:
    deaf = !deaf;
    break;
  case 26:
    trickle = input_byte() % 32;
    break;
  case 27:
    say_notice(input_byte());
    break;
  case 28:
    say_end(input_byte());
    break;
  case 29:
    hang_up();
    break;
  case 30:
  case 31:
  case 32:
    answer_command(SUCCESS, 0);
    break;
  case 33: /* somebody unlocks what the client holds, which an honest server does not do */
    if (!run.honest && known_count > 0) {
      struct known *k = &known[input_byte() % (unsigned)known_count];
      k->held = 0;
      memset(k->at, 0, sizeof k->at);
    }
    answer_command(SUCCESS, 0);
    break;
  case 34:
  case 35:
    answer_command(input_outcome(), 0);
    break;
  case 36: {
    enum outcome outcome = input_outcome();
    answer_command(outcome, input_byte());
    break;
  }
  case 37:
    put_any(input_byte());
    answer_say(0);
    break;
  case 38: {
    unsigned which = input_byte();
    say_any_wrong(which, input_byte());
    break;
  }
  case 39:
    say_raw(input_byte());
    break;
  }
}

/* The client has nothing to do before the server speaks or `seconds` have passed. */
static void wait_for_server(double seconds) {
  receive();
  if (input_left()) {
    instruct();
    receive();
    deliver(trickle);
    return;
  }
  if (run.waits++ > MAX_WAITS / 2 || run.closes || (!isfinite(seconds) && run.waits > 20)) {
    deliver(0);
    hang_up();
    now += isfinite(seconds) ? seconds : 0;
  }
  if (run.waits > MAX_WAITS) finding("the client waits on and on");
  deaf = false;
  threads_run();
  if (!run.connected) {
    if (run.waits == 1) handshake();
    else now += seconds;
  } else if (run.silent || !answer_command(SUCCESS, 0))
    now += isfinite(seconds) ? seconds : 0;
  deliver(0);
}

/* ---- a run ----------------------------------------------------------------------------- */

static void connect_client(bool scripted) {
  const char *code;
  lua_getfield(L, START, "connect");
  lua_createtable(L, 0, 8);
  lua_pushstring(L, host);
  lua_setfield(L, -2, "host");
  lua_pushliteral(L, "5432");
  lua_setfield(L, -2, "port");
  lua_pushliteral(L, "u");
  lua_setfield(L, -2, "user");
  lua_pushliteral(L, CANARY);
  lua_setfield(L, -2, "password");
  lua_pushliteral(L, "disable");
  lua_setfield(L, -2, "sslmode");
  lua_pushliteral(L, "disable");
  lua_setfield(L, -2, "gssencmode");
  lua_pushinteger(L, 5);
  if (call("connect", 2) != NULL) finding("connect raises");
  lua_replace(L, CONNECTION);
  peer = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (peer < 0) finding("accept: %s", strerror(errno));
  if (!scripted) handshake();
  deliver(0);
  run.busy = true;
  drive();
  run.busy = false;
  lua_settop(L, TOP);
  push_call(CORE, "finish");
  code = run.abandoned ? "interrupted" : call("connect", 1);
  if (code != NULL) {
    if (strcmp(code, "interrupted") != 0) finding("finish of connect raises %s", code);
  } else if (lua_isnil(L, TOP + 1)) {
    lua_settop(L, TOP + 2);
    harness_error(L, "connect", true);
  } else {
    receive(); /* what was written until now is no message like those that follow */
    run.connected = true;
  }
  lua_settop(L, TOP);
}

/* Between its calls the client has no savepoint of its own open. */
static void no_savepoint_must_be_left(void) {
  if (!run.honest || !is_settled() || server.transaction != 'T') return;
  for (int i = 0; i < server.savepoints; i++)
    if (strcmp(server.savepoint[i], "pglocks") == 0) finding("a savepoint is left open");
}

/* False: the session is over. */
static bool settle(void) {
  for (int i = 0; i < 3; i++)
    if (ping() != NULL || peer < 0) return false;
  return true;
}

static void compare_locks(void) {
  const bool *listed = locks();
  for (int i = 0; i < known_count; i++) {
    const struct known *k = &known[i];
    if (listed[i] != (counted(k) > 0) || k->held > 1)
      finding("%u %u %d%s%s: the client says %s, the server counts %d", k->classid, k->objid,
              k->objsubid, k->shared ? " shared" : "", k->transaction ? " of the transaction" : "",
              listed[i] ? "held" : "not held", counted(k));
  }
}

/* In the end both sides must agree: in a transaction that has not failed; after that of the user's; and
 * when there is no lock any more, nor a transaction that one has begun. */
static void compare(void) {
  threads_refused = deaf = false;
  fails_in = 0;
  if (!settle()) return;
  nothing_must_stay();
  no_savepoint_must_be_left();
  push_call(CORE, "in_transaction");
  call("in_transaction", 1);
  if (lua_toboolean(L, TOP + 1) != (server.transaction != 'I'))
    finding("the client takes the state of the transaction for another than %c", server.transaction);
  lua_settop(L, TOP);
  if (server.transaction == 'T' && server.savepoints == 0) compare_locks();
  if (server.transaction != 'I' && server.users) {
    query(3);
    if (!settle()) return;
  }
  if (server.transaction == 'I') compare_locks();
  for (int slot = 1; slot <= MAX_LOCKS; slot++) {
    lua_pushnil(L);
    lua_rawseti(L, LOCKS, slot);
  }
  lua_gc(L, LUA_GCCOLLECT);
  lua_gc(L, LUA_GCCOLLECT);
  if (!settle()) return;
  if (server.transaction != 'I') finding("a transaction is left open, in state %c", server.transaction);
  compare_locks();
}

/* Files that are open now and were not at the end of the first run, which has opened what the
 * module opens once in a process. The sanitizers' symbolizer is reached by pipes. */
static void check_files(void) {
  static bool open_before[FILES], looked;
  for (int fd = 0; fd < FILES; fd++) {
    char link[32], name[64] = "";
    if (fcntl(fd, F_GETFD) < 0 || open_before[fd]) continue;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (looked && readlink(link, name, sizeof name - 1) > 0 && strncmp(name, "pipe:", 5) != 0)
      finding("a file is left open: %s", name);
    open_before[fd] = true;
  }
  looked = true;
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
  struct sockaddr_un address = {.sun_family = AF_UNIX}; /* abstract: there is no file */
  int length;
  (void)argc, (void)argv;
  unsetenv("PGSERVICE");
  unsetenv("PGHOSTADDR");
  snprintf(host, sizeof host, "@pglocks-fuzz-%ld", (long)getpid());
  length = snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "%s/.s.PGSQL.5432",
                    host + 1);
  listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (bind(listener, (struct sockaddr *)&address,
           (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length)) != 0 ||
      listen(listener, 8) != 0)
    finding("bind: %s", strerror(errno));
  return 0;
}

static void push_core(void) {
  lua_getglobal(L, "require");
  lua_pushliteral(L, "pglocks.core");
  lua_call(L, 1, 1);
  lua_settop(L, CORE);
  lua_getfield(L, CORE, "start");
  lua_getfield(L, CORE, "connection");
  lua_getfield(L, CORE, "lock");
  lua_pushnil(L);
  lua_newtable(L);
  lua_newtable(L); /* of a lock that has joined another one: how often on_end was told */
  lua_createtable(L, 0, 1);
  lua_pushliteral(L, "k");
  lua_setfield(L, -2, "__mode");
  lua_setmetatable(L, -2);
  lua_setfield(L, LUA_REGISTRYINDEX, "fuzz joined");
}

/* With the same on its stack. */
static lua_State *thread(const char *name) {
  lua_State *made = lua_newthread(L);
  lua_setfield(L, LUA_REGISTRYINDEX, name);
  for (int i = 1; i <= TOP; i++) {
    lua_pushvalue(L, i);
    lua_xmove(L, made, 1);
  }
  return made;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  unsigned mode;
  input = data;
  input_end = data + size;
  mode = input_byte();
  memset(&run, 0, sizeof run);
  memset(&open_now, 0, sizeof open_now);
  memset(&server, 0, sizeof server);
  memset(commands, 0, sizeof *commands);
  server.transaction = 'I';
  known_count = asked = received = answered = told = thread_count = 0;
  ended = idle = gone_back = -1;
  told_failed = seems_failed = may_end = may_commit = false;
  in.length = out.length = answer.length = trickle = 0;
  answer.count = 0;
  threads_refused = deaf = cancel_arrived = memory_failed = false;
  fails_in = 0;
  kept = 0;
  now = 1000;
  run.tried = -1;
  run.honest = mode & 1;
  run.silent = (mode & 6) == 2;
  run.closes = (mode & 6) == 4;
  run.scheduled = mode & 8;
  if (run.honest) run.silent = run.closes = false;

  L = harness_state();
  push_core();
  connect_client(!run.honest && (mode & 0xf0) == 0xf0);
  meanwhile = thread("fuzz meanwhile");
  ending = thread("fuzz ending");
  if (run.connected) {
    push_call(CORE, "configure");
    lua_createtable(L, 0, 2);
    lua_pushcfunction(L, on_end);
    lua_setfield(L, -2, "on_end");
    lua_pushcfunction(L, on_lost);
    lua_setfield(L, -2, "on_lost");
    call("configure", 2);
    lua_settop(L, TOP);
    if (run.scheduled) configure("scheduled", true);
    if ((mode & 0x30) == 0x10) configure("deferred", true);
    while (input_left()) {
      instruct();
      receive();
      deliver(trickle);
    }
    for (unsigned slot = 0; slot < MAX_LOCKS; slot++)
      if (push_lock(slot)) ask_held();
    locks();
    nothing_must_stay();
    if (run.honest && peer >= 0) compare();
    if (mode & 0x40) {
      close_connection();
      for (unsigned slot = 0; slot < MAX_LOCKS; slot++)
        if (push_lock(slot) && ask_held()) finding("held() is true after close()");
    }
  }
  if (mode & 0x80) threads_run();
  fails_in = 0;
  run.ends = true; /* from now on it only counts */
  lua_close(L);
  threads_run();
  hang_up();
  if (open_now.connections != 0 || open_now.results != 0 || open_now.cancels != 0 ||
      open_now.blocks != 0)
    finding("left over: %d connections, %d results, %d cancel requests, %d blocks of memory",
            open_now.connections, open_now.results, open_now.cancels, open_now.blocks);
  check_files();
  return 0;
}
