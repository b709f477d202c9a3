/* command.c: commands in flight: what is sent, and what comes back.
 *
 * libpq runs in pipeline mode. A command is everything up to one Sync, so that an error in it
 * skips the rest of it and nothing else; its answers come back in the order sent. */
#include "pglocks.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define NO_STATEMENT (-1)
#define SQL_SIZE 3072 /* room for any of ours, with a comment */

#define CHANNEL "pglocks " /* and a marker */
#define SAVE "SAVEPOINT pglocks"
#define LOCALLY(name, value) "pg_catalog.set_config('" name "','" value "',true)"

enum { INT8_OID = 20, INT4_OID = 23, TEXT_OID = 25, INT8_ARRAY_OID = 1016 };

struct statement {
  const char *name, *sql;
};

#define LOCK_SQL(f, key) "SELECT pg_catalog." f "(" key ")"
#define TIMED_SQL(f, key, ms)                                                                    \
  "SELECT CASE WHEN pg_catalog.set_config('lock_timeout'," ms ",true) IS NOT NULL"               \
  " THEN pg_catalog." f "(" key ") END"
#define VERB_STATEMENTS(name, f)                                                                 \
  {name "_8", LOCK_SQL(f, "$1")}, {name "_44", LOCK_SQL(f, "$1,$2")},                            \
      {name "_shared_8", LOCK_SQL(f "_shared", "$1")},                                           \
  {                                                                                              \
    name "_shared_44", LOCK_SQL(f "_shared", "$1,$2")                                            \
  }

#define XACT_TIMED_SQL(mode, key, ms)                                                            \
  RESTORING_SQL(TIMED_SQL("pg_advisory_xact_lock" mode, key, ms))

/* A position in the log that only grows, also across crashes, once it has been written to the disk: so
 * the commit waits for that, whatever the role says. NULL where nothing ever is; 0 on a standby. */
#define TOKEN_SQL                                                                                \
  "SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN 0"                                       \
  " WHEN pg_catalog.current_setting('fsync') OPERATOR(pg_catalog.=) 'on'"                        \
  " AND pg_catalog.set_config('synchronous_commit','on',true) IS NOT NULL"                       \
  " THEN pg_catalog.pg_logical_emit_message(true,'pglocks','')"                                  \
  " OPERATOR(pg_catalog.-) '0/0'::pg_catalog.pg_lsn END"

/* A marker that cannot be had, be it for an instant, is somebody's who waits. */
#define ANNOUNCE_SQL                                                                             \
  "SELECT pg_catalog.count(CASE WHEN NOT pg_catalog.pg_try_advisory_xact_lock(m.key)"            \
  " THEN pg_catalog.pg_notify('" CHANNEL "' OPERATOR(pg_catalog.||) m.key::pg_catalog.text,'')"  \
  " END) OPERATOR(pg_catalog.>=) 0 FROM pg_catalog.unnest($1) m(key)"

/* ---- many keys: $1 an array, $2 how many of them are 64-bit keys; the rest are pairs */

#define KEYS "pg_catalog.unnest($1) WITH ORDINALITY k(key,i)"
#define PAIR_HIGH "(k.key OPERATOR(pg_catalog.>>) 32)::pg_catalog.int4"
#define PAIR_LOW                                                                                 \
  "((k.key OPERATOR(pg_catalog.<<) 32) OPERATOR(pg_catalog.>>) 32)::pg_catalog.int4"
#define ON_EACH(f)                                                                               \
  "CASE WHEN k.i OPERATOR(pg_catalog.<=) $2 THEN pg_catalog." f "(k.key)"                        \
  " ELSE pg_catalog." f "(" PAIR_HIGH "," PAIR_LOW ") END"
/* 't' and 'f', one for each key. Where only the keys are read they come in their order; to sort them
 * would take as long as to unlock them. */
#define MARKS(cases, order)                                                                      \
  "SELECT pg_catalog.string_agg(CASE " cases " THEN 't' ELSE 'f' END,''" order ") FROM " KEYS
/* lock_timeout counts anew for every key, so each that has to wait gets what remains of $3; not more,
 * where the server's clock is set back meanwhile. */
#define REMAINING                                                                                \
  "LEAST($3::pg_catalog.float8,GREATEST(1,pg_catalog.ceil($3::pg_catalog.float8 OPERATOR(pg_catalog.-)" \
  " (pg_catalog.date_part('epoch',pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-)"           \
  " pg_catalog.statement_timestamp()) OPERATOR(pg_catalog.*) 1000))))"                           \
  "::pg_catalog.int8::pg_catalog.text"
#define LOCK_ALL_SQL(f)                                                                          \
  "SELECT pg_catalog.count(" ON_EACH(f) ") OPERATOR(pg_catalog.>=) 0 FROM " KEYS
#define TIMED_ALL_SQL(xact, mode)                                                                \
  "SELECT pg_catalog.count(CASE WHEN NOT " ON_EACH("pg_try_advisory_" xact "lock" mode)          \
  " THEN CASE WHEN pg_catalog.set_config('lock_timeout'," REMAINING ",true) IS NOT NULL"         \
  " THEN " ON_EACH("pg_advisory_" xact "lock" mode) " END END) OPERATOR(pg_catalog.>=) 0 FROM " KEYS
/* In a transaction what is set lasts as long as that, and may be the user's own: so it is set back. */
#define RESTORING_SQL(acquire)                                                                   \
  "SELECT CASE WHEN (" acquire ") IS NOT NULL"                                                   \
  " THEN pg_catalog.set_config('lock_timeout',before.lock_timeout,true) IS NOT NULL END"         \
  " FROM (SELECT pg_catalog.current_setting('lock_timeout') OFFSET 0) before(lock_timeout)"
/* What a try of many got before one that is busy goes with the transaction or its savepoint. */
#define XACT_TRY_ALL_SQL(mode)                                                                   \
  "SELECT NOT EXISTS (SELECT 1 FROM " KEYS                                                       \
  " WHERE NOT " ON_EACH("pg_try_advisory_xact_lock" mode) ")"
/* Stops at the first that is busy, and lets those before it go. */
#define TRY_ALL_SQL(mode)                                                                        \
  "SELECT CASE WHEN busy.i IS NULL THEN true ELSE (SELECT"                                       \
  " pg_catalog.count(" ON_EACH("pg_advisory_unlock" mode) ") FROM " KEYS                         \
  " WHERE k.i OPERATOR(pg_catalog.<) busy.i) IS NULL END"                                        \
  " FROM (SELECT (SELECT k.i FROM " KEYS " WHERE NOT " ON_EACH("pg_try_advisory_lock" mode)      \
  " LIMIT 1) OFFSET 0) busy(i)"
#define UNLOCK_ALL_SQL(mode) MARKS("WHEN " ON_EACH("pg_advisory_unlock" mode), "")
#define TRY_EACH_SQL(mode) MARKS("WHEN " ON_EACH("pg_try_advisory_lock" mode), "")

/* Everything is qualified: a role that may create functions must not hijack a lock. */
static const struct statement statements[STATEMENTS] = {
    VERB_STATEMENTS("pglocks_lock", "pg_advisory_lock"),
    {"pglocks_timed_8", TIMED_SQL("pg_advisory_lock", "$1", "$2")},
    {"pglocks_timed_44", TIMED_SQL("pg_advisory_lock", "$1,$2", "$3")},
    {"pglocks_timed_shared_8", TIMED_SQL("pg_advisory_lock_shared", "$1", "$2")},
    {"pglocks_timed_shared_44", TIMED_SQL("pg_advisory_lock_shared", "$1,$2", "$3")},
    VERB_STATEMENTS("pglocks_try", "pg_try_advisory_lock"),
    VERB_STATEMENTS("pglocks_xact_lock", "pg_advisory_xact_lock"),
    {"pglocks_xact_timed_8", XACT_TIMED_SQL("", "$1", "$2")},
    {"pglocks_xact_timed_44", XACT_TIMED_SQL("", "$1,$2", "$3")},
    {"pglocks_xact_timed_shared_8", XACT_TIMED_SQL("_shared", "$1", "$2")},
    {"pglocks_xact_timed_shared_44", XACT_TIMED_SQL("_shared", "$1,$2", "$3")},
    VERB_STATEMENTS("pglocks_xact_try", "pg_try_advisory_xact_lock"),
    VERB_STATEMENTS("pglocks_unlock", "pg_advisory_unlock"),
    {"pglocks_lock_all", LOCK_ALL_SQL("pg_advisory_lock")},
    {"pglocks_lock_all_shared", LOCK_ALL_SQL("pg_advisory_lock_shared")},
    {"pglocks_timed_all", TIMED_ALL_SQL("", "")},
    {"pglocks_timed_all_shared", TIMED_ALL_SQL("", "_shared")},
    {"pglocks_try_all", TRY_ALL_SQL("")},
    {"pglocks_try_all_shared", TRY_ALL_SQL("_shared")},
    {"pglocks_xact_lock_all", LOCK_ALL_SQL("pg_advisory_xact_lock")},
    {"pglocks_xact_lock_all_shared", LOCK_ALL_SQL("pg_advisory_xact_lock_shared")},
    {"pglocks_xact_timed_all", RESTORING_SQL(TIMED_ALL_SQL("xact_", ""))},
    {"pglocks_xact_timed_all_shared", RESTORING_SQL(TIMED_ALL_SQL("xact_", "_shared"))},
    {"pglocks_xact_try_all", XACT_TRY_ALL_SQL("")},
    {"pglocks_xact_try_all_shared", XACT_TRY_ALL_SQL("_shared")},
    {"pglocks_unlock_all", UNLOCK_ALL_SQL("")},
    {"pglocks_unlock_all_shared", UNLOCK_ALL_SQL("_shared")},
    {"pglocks_try_each", TRY_EACH_SQL("")},
    {"pglocks_try_each_shared", TRY_EACH_SQL("_shared")},
    {"pglocks_token", TOKEN_SQL},
};

/* The guard looks for the locks in pg_locks before it unlocks: unlocking what is not held would
 * write a warning to the server's log at every ordinary timeout. */
#define UINT32(n) "((" n " OPERATOR(pg_catalog.&) 4294967295)::pg_catalog.oid)"
#define GUARD_SQL(held, mode)                                                                    \
  MARKS("WHEN l.pid IS NULL THEN 'f' WHEN " held, " ORDER BY k.i")                               \
  " LEFT JOIN pg_catalog.pg_locks l"                                                             \
  " ON l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()"                                 \
  " AND l.locktype OPERATOR(pg_catalog.=) 'advisory' AND l.granted"                              \
  " AND l.mode OPERATOR(pg_catalog.=) '" mode "'"                                                \
  " AND l.classid OPERATOR(pg_catalog.=) " UINT32("(k.key OPERATOR(pg_catalog.>>) 32)")          \
  " AND l.objid OPERATOR(pg_catalog.=) " UINT32("k.key")                                         \
  " AND l.objsubid OPERATOR(pg_catalog.=) CASE WHEN k.i OPERATOR(pg_catalog.<=) $2"              \
  " THEN 1 ELSE 2 END"

static const char *const guards[2][2] = {
    /* shared, guard */
    {GUARD_SQL("true", "ExclusiveLock"), GUARD_SQL(ON_EACH("pg_advisory_unlock"), "ExclusiveLock")},
    {GUARD_SQL("true", "ShareLock"), GUARD_SQL(ON_EACH("pg_advisory_unlock_shared"), "ShareLock")}};

/* ---- sending --------------------------------------------------------------------------- */

static void command_recycle(struct session *s, struct command *c) {
  c->next = s->spare_commands;
  s->spare_commands = c;
}

/* Queues a command whose messages are being written; command_end sends it. */
static struct command *command_begin(struct session *s) {
  struct command *c;
  if (s->late.count > 0) command_late(s);
  if (s->pg == NULL) { /* lost since the operation was begun */
    if (s->op.kind != NULL && !s->op.done)
      operation_done(s, LOST, s->loss.sqlstate, "%s", s->loss.message);
    return NULL;
  }
  c = s->spare_commands;
  if (c != NULL)
    s->spare_commands = c->next;
  else if ((c = malloc(sizeof *c)) == NULL) {
    session_lose(s, LOST, "", "out of memory");
    return NULL;
  }
  memset(c, 0, offsetof(struct command, answer.failure));
  c->statement = NO_STATEMENT;
  return c;
}

static void command_end(struct session *s, struct command *c, bool written) {
  if (!written || !PQpipelineSync(s->pg)) {
    command_recycle(s, c);
    session_lose(s, LOST, "", PQerrorMessage(s->pg));
    return;
  }
  s->written = true;
  *s->newest = c;
  s->newest = &c->next;
  for (struct holding *h = c->leaving.first; h != NULL; h = h->after[LEAVING]) h->releasing++;
  if (c->leaving.count == 0 && !c->abandoned) s->op.unanswered++;
}

static bool send_sql(struct session *s, const char *sql) {
  return PQsendQueryParams(s->pg, sql, 0, NULL, NULL, NULL, NULL, 0);
}

/* In the user's transaction a savepoint keeps our statement from aborting or changing it: what
 * the statement set, its lock_timeout, goes with the savepoint; a session lock stays. */
static bool send_before(struct session *s) {
  return !s->in_transaction || send_sql(s, SAVE);
}

static bool send_after(struct session *s) {
  return !s->in_transaction || (send_sql(s, ROLL_BACK_TO_SAVED) && send_sql(s, RELEASE_SAVED));
}

/* Behind a pooler of transactions nothing may be set for a session, but no time-out of the role or the
 * database may end a holder or a waiter. */
static bool send_begin(struct session *s) {
  char sql[512];
  if (!send_sql(s, "BEGIN")) return false;
  if (s->pooling != TRANSACTION_POOLING) return true;
  snprintf(sql, sizeof sql,
           "SELECT " LOCALLY("statement_timeout", "0") "," LOCALLY("lock_timeout", "0") ","
           LOCALLY("idle_in_transaction_session_timeout", "%.0f") "%s%s",
           s->lease * 1000,
           s->server_version >= 140000 ? ",CASE WHEN pg_catalog.version() OPERATOR(pg_catalog.~~)"
                                         " '%linux%' THEN " LOCALLY(
                                             "client_connection_check_interval", "5000") " END"
                                       : "",
           s->server_version >= 170000 ? "," LOCALLY("transaction_timeout", "0") : "");
  return send_sql(s, sql);
}

/* What a statement of the transaction's scope stands in: a transaction of its own, or a savepoint, where
 * the locks stay when that is released. */
static bool send_before_joining(struct session *s) {
  return s->in_transaction ? send_sql(s, SAVE) : send_begin(s);
}

/* A statement's portal lives, with its snapshot, until the next takes its place: so something has to, be
 * it nothing at all. */
static bool send_after_joining(struct session *s, bool keeps, const char *comment) {
  if (!s->in_transaction) return send_sql(s, comment != NULL ? comment : "");
  return keeps || send_sql(s, RELEASE_SAVED);
}

static char *put_uint32(char *to, uint32_t n) {
  to[0] = (char)(n >> 24);
  to[1] = (char)(n >> 16);
  to[2] = (char)(n >> 8);
  to[3] = (char)n;
  return to + 4;
}

bool command_reserve(struct session *s, size_t count) {
  int needed = (int)PACKED_SIZE(count) * 2, has = 0;
  socklen_t length = sizeof has;
  char *larger;
  if (count <= s->packed_for) return true;
  larger = malloc(PACKED_SIZE(count));
  if (larger == NULL) return false;
  if (s->packed != s->first_packed) free(s->packed);
  s->packed = larger;
  s->packed_for = count;
  if (getsockopt(PQsocket(s->pg), SOL_SOCKET, SO_SNDBUF, &has, &length) == 0 && has < needed)
    setsockopt(PQsocket(s->pg), SOL_SOCKET, SO_SNDBUF, &needed, sizeof needed);
  return true;
}

/* An array in binary form: one dimension, no NULLs, of int8, so many, the first being number 1. */
static char *pack_head(struct session *s, int count) {
  char *to = put_uint32(put_uint32(put_uint32(s->packed, 1), 0), INT8_OID);
  return put_uint32(put_uint32(to, (uint32_t)count), 1);
}

static char *pack_key(char *to, const struct key *key) {
  return put_uint32(put_uint32(put_uint32(to, 8), key->classid), key->objid);
}

static void pack(struct session *s, const struct chain *chain) {
  char *to = pack_head(s, chain->count);
  for (const struct holding *h = chain->first; h != NULL; h = h->after[chain->kind])
    to = pack_key(to, &h->key);
}

struct parameters {
  int n;
  Oid types[3];
  const char *values[3];
  int lengths[3], formats[3];
  char bytes[8]; /* what small values point to */
};

static void add_binary(struct parameters *p, Oid type, const char *value, size_t length) {
  p->types[p->n] = type;
  p->values[p->n] = value;
  p->lengths[p->n] = (int)length;
  p->formats[p->n++] = 1;
}

static void add_text(struct parameters *p, const char *value) {
  p->types[p->n] = TEXT_OID;
  p->values[p->n] = value;
  p->formats[p->n++] = 0;
}

static void add_key(struct parameters *p, const struct key *key) {
  put_uint32(put_uint32(p->bytes, key->classid), key->objid);
  if (key->objsubid == 1)
    add_binary(p, INT8_OID, p->bytes, 8);
  else {
    add_binary(p, INT4_OID, p->bytes, 4);
    add_binary(p, INT4_OID, p->bytes + 4, 4);
  }
}

static void add_keys(struct parameters *p, struct session *s, const struct chain *chain) {
  pack(s, chain);
  put_uint32(p->bytes, (uint32_t)(chain->count - chain->pairs));
  add_binary(p, INT8_ARRAY_OID, s->packed, PACKED_SIZE(chain->count));
  add_binary(p, INT4_OID, p->bytes, 4);
}

/* Behind a pooler another session may answer, and hold locks of others: there a statement acts only
 * in the session that it is meant for, and a second column says whether that was it. */
static const char *in_own_session(const struct session *s, const char *sql, char buffer[SQL_SIZE]) {
  static const char own[] = "pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) ";
  if (s->pooling != SESSION_POOLING) return sql;
  snprintf(buffer, SQL_SIZE, "SELECT CASE WHEN %s%d THEN (%s) END, %s%d", own, s->backend_pid, sql,
           own, s->backend_pid);
  return buffer;
}

static struct command *command_about(struct session *s, const struct chain *chain) {
  struct command *c = command_begin(s);
  if (c != NULL && chain->kind == LEAVING) c->leaving = *chain;
  return c;
}

/* A comment is of one call: such a statement is not worth preparing. Apart, so that its buffers do not
 * spread the stack of those that are. */
__attribute__((noinline)) static bool send_unprepared(struct session *s, const char *comment,
                                                      const char *statement,
                                                      const struct parameters *p) {
  char sql[SQL_SIZE], own[SQL_SIZE];
  int length = snprintf(sql, sizeof sql, "%s%s", comment != NULL ? comment : "",
                        in_own_session(s, statement, own));
  return length > 0 && (size_t)length < sizeof sql &&
         PQsendQueryParams(s->pg, sql, p->n, p->types, p->values, p->lengths, p->formats, 0);
}

/* Prepares a statement at its first use; behind a pooler none is. */
static bool prepare(struct session *s, struct command *c, int id, const struct parameters *p) {
  uint64_t bit = (uint64_t)1 << id;
  if (s->pooling != DIRECT) return true;
  c->statement = id;
  if (s->prepared & bit) return true;
  s->prepared |= bit;
  c->prepares = true;
  return PQsendPrepare(s->pg, statements[id].name, statements[id].sql, p->n, p->types);
}

static bool send_statement(struct session *s, int id, const char *comment,
                           const struct parameters *p) {
  if (comment != NULL || s->pooling != DIRECT)
    return send_unprepared(s, comment, statements[id].sql, p);
  return PQsendQueryPrepared(s->pg, statements[id].name, p->n, p->values, p->lengths, p->formats,
                             0);
}

static bool send_announcements(struct session *s) {
  struct parameters p = {.n = 0};
  char *to = pack_head(s, s->announced);
  for (int i = 0; i < s->announced; i++) to = pack_key(to, &s->announcements[i]);
  add_binary(&p, INT8_ARRAY_OID, s->packed, PACKED_SIZE(s->announced));
  s->announced = 0;
  return send_unprepared(s, NULL, ANNOUNCE_SQL, &p);
}

/* Behind what ends a lock, in the same message. */
static bool send_behind(struct session *s, struct command *c) {
  if (s->announced == 0) return true;
  c->announces = true;
  return send_announcements(s);
}

void command_announce(struct session *s) {
  struct command *c = command_begin(s);
  if (c == NULL) return;
  c->abandoned = true;
  command_end(s, c, send_announcements(s));
}

static bool verb_joins(enum verb verb) { return verb >= VERB_XACT_LOCK && verb <= VERB_XACT_TRY; }

void command_statement(struct session *s, enum verb verb, const struct chain *chain,
                       const char *milliseconds, const char *comment) {
  const struct holding *h = chain->first;
  bool many = chain->count > 1, joins = verb_joins(verb), written;
  bool each = many && verb == VERB_TRY && s->op.each;
  int id = each   ? TRY_EACH + h->shared
           : many ? MANY + (int)verb * 2 + h->shared
                  : (int)verb * 4 + h->shared * 2 + (h->key.objsubid == 2);
  struct parameters p;
  struct command *c = command_about(s, chain);
  if (c == NULL) return;
  c->marks = verb == VERB_UNLOCK || each;
  p.n = 0;
  if (many)
    add_keys(&p, s, chain);
  else
    add_key(&p, &h->key);
  if (milliseconds != NULL) add_text(&p, milliseconds);
  written = (comment != NULL || prepare(s, c, id, &p)) &&
            (joins ? send_before_joining(s) : send_before(s)) &&
            send_statement(s, id, comment, &p) &&
            (joins ? send_after_joining(s, many && verb == VERB_XACT_TRY, comment)
                   : send_after(s)) &&
            (verb != VERB_UNLOCK || s->in_transaction || send_behind(s, c));
  command_end(s, c, written);
}

static void late_lands(struct session *s) {
  for (struct holding *h = s->late.first; h != NULL; h = h->after[LEAVING]) h->releasing--;
  s->late = (struct chain){.kind = LEAVING};
  s->hasty = 0;
}

void command_late(struct session *s) {
  struct chain chain = s->late;
  late_lands(s);
  if (chain.count > 0 && s->state == SESSION_OPEN && !session_is_foreign(s))
    command_statement(s, VERB_UNLOCK, &chain, NULL, NULL);
}

void command_token(struct session *s) {
  struct parameters p = {.n = 0};
  struct command *c = command_begin(s);
  if (c == NULL) return;
  c->draws = true;
  command_end(s, c, prepare(s, c, TOKEN, &p) && send_statement(s, TOKEN, NULL, &p));
}

static bool send_about_channel(struct session *s, const char *verb, const struct key *marker) {
  char sql[64];
  int64_t number = (int64_t)((uint64_t)marker->classid << 32 | marker->objid);
  snprintf(sql, sizeof sql, "%s \"" CHANNEL "%lld\"", verb, (long long)number);
  return send_sql(s, sql);
}

void command_listen(struct session *s, const struct key *marker) {
  struct command *c = command_begin(s);
  if (c != NULL) command_end(s, c, send_about_channel(s, "LISTEN", marker));
}

void command_unlisten(struct session *s, const struct key *marker) {
  struct command *c = command_begin(s);
  if (c == NULL) return;
  c->abandoned = true;
  command_end(s, c, marker == NULL ? send_sql(s, "UNLISTEN *")
                                   : send_about_channel(s, "UNLISTEN", marker));
}

void command_guard(struct session *s, enum guard guard, const struct chain *chain) {
  char own[SQL_SIZE];
  const char *sql;
  bool written;
  struct parameters p;
  struct command *c = command_about(s, chain);
  if (c == NULL) return;
  c->settles = guard == GUARD_UNLOCK;
  c->looks = guard == GUARD_LOOK;
  /* Nobody else could tell whose the transaction is. */
  c->vital = c->looks && chain->kind == LEAVING;
  c->marks = true;
  p.n = 0;
  add_keys(&p, s, chain);
  sql = in_own_session(s, guards[chain->first->shared][guard], own);
  written = send_before(s) &&
            PQsendQueryParams(s->pg, sql, p.n, p.types, p.values, p.lengths, p.formats, 0) &&
            send_after(s);
  command_end(s, c, written);
}

void command_simple(struct session *s, const char *first, const char *second) {
  struct command *c = command_begin(s);
  if (c == NULL) return;
  command_end(s, c, send_sql(s, first) && (second == NULL || send_sql(s, second)));
}

/* All in one message: the server has read it before it can see that the socket was closed. */
void command_unlock_all(struct session *s) {
  struct command *c = command_begin(s);
  char own[SQL_SIZE];
  bool written;
  if (c == NULL) return;
  written = (!s->in_transaction || send_sql(s, "ROLLBACK")) &&
            (s->pooling == TRANSACTION_POOLING ||
             send_sql(s, in_own_session(s, "SELECT pg_catalog.pg_advisory_unlock_all()", own)));
  command_end(s, c, written && (s->announced == 0 || send_announcements(s)));
}

void command_begin_transaction(struct session *s) {
  struct command *c = command_begin(s);
  if (c != NULL) command_end(s, c, send_begin(s));
}

void command_commit(struct session *s, const struct key *told) {
  struct command *c = command_begin(s);
  if (c == NULL) return;
  c->commits = true;
  c->abandoned = told != NULL;
  if (told != NULL) c->key = *told;
  command_end(s, c, send_sql(s, "COMMIT") && send_behind(s, c));
  if (s->pg != NULL && told != NULL) transaction_ended(s);
}

void command_query(struct session *s, const char *sql, int nparams, const char *const *values) {
  struct command *c = command_begin(s);
  if (c == NULL) return;
  c->keep_result = true;
  command_end(s, c,
                     PQsendQueryParams(s->pg, sql, nparams, NULL, values, NULL, NULL, 0));
}

void command_sync(struct session *s) {
  struct command *c = command_begin(s);
  if (c != NULL) command_end(s, c, true);
}

void command_nothing(struct session *s) {
  struct command *c = command_begin(s);
  if (c == NULL) return;
  c->abandoned = true;
  command_end(s, c, true);
}

void command_rollback(struct session *s, bool awaited) {
  struct command *c = command_begin(s);
  if (c == NULL) return;
  c->abandoned = c->vital = !awaited;
  holdings_announce(s, false);
  command_end(s, c, send_sql(s, "ROLLBACK") && send_behind(s, c));
  if (awaited) return;
  if (s->pg == NULL) return;
  transaction_ended(s);
  holdings_settle(s);
  if (s->op.kind == NULL) notify_settle(s);
}

enum { LIBPQ_READS = 8192 };

/* ---- answers --------------------------------------------------------------------------- */

static enum code code_of(const char *sqlstate) {
  static const struct {
    char sqlstate[SQLSTATE_SIZE];
    enum code code;
  } codes[] = {
      {"55P03", TIMEOUT},        {"57014", INTERRUPTED},         {"40P01", DEADLOCK},
      {"53200", TOO_MANY_LOCKS}, {"25P02", ABORTED_TRANSACTION}, {"42501", PERMISSION},
      {"53300", TOO_MANY_CONNECTIONS},
  };
  for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
    if (strcmp(codes[i].sqlstate, sqlstate) == 0) return codes[i].code;
  return SERVER;
}

static void note_error(struct session *s, struct command *c, const PGresult *result) {
  const char *sqlstate = PQresultErrorField(result, PG_DIAG_SQLSTATE);
  const char *message = PQresultErrorField(result, PG_DIAG_MESSAGE_PRIMARY);
  const char *severity = PQresultErrorField(result, PG_DIAG_SEVERITY_NONLOCALIZED);
  struct failure *failure = &c->answer.failure;
  if (sqlstate == NULL) sqlstate = "";
  if (!c->answer.failed)
    failure_set(failure, code_of(sqlstate), sqlstate, "%s",
                message ? message : PQresultErrorMessage(result));
  c->answer.failed = c->answer.failed || !c->settled; /* what it has announced is not its own */
  /* Not prepared, or dropped by somebody (DISCARD ALL, DEALLOCATE): prepare it anew. Without a
   * SQLSTATE it is libpq that had no memory for the answer, and the server has prepared it. */
  if (c->statement != NO_STATEMENT &&
      ((c->prepares && c->results == 0 && *sqlstate != '\0') || strcmp(sqlstate, "26000") == 0))
    s->prepared &= ~((uint64_t)1 << c->statement);
  if (severity != NULL && (strcmp(severity, "FATAL") == 0 || strcmp(severity, "PANIC") == 0)) {
    s->doomed = true;
    s->loss = *failure;
  }
}

/* Hands a 't' or 'f' to each holding of the command. */
static enum value note_marks(struct session *s, const struct command *c, const char *marks,
                             int length) {
  const struct chain *chain = c->leaving.count > 0 ? &c->leaving : &s->op.asked;
  int found = 0;
  if (c->abandoned || length != chain->count) return VALUE_OTHER;
  for (struct holding *h = chain->first; h != NULL; h = h->after[chain->kind])
    found += h->found[chain->kind] = *marks++ == 't';
  return found == 0 ? VALUE_FALSE : found == length ? VALUE_TRUE : VALUE_SOME;
}

/* False: another session answered than the one that the command was meant for. */
static bool note_value(struct session *s, struct command *c, const PGresult *result) {
  const char *value;
  int length;
  if (s->pooling == SESSION_POOLING && !c->keep_result && PQnfields(result) == 2 && PQntuples(result) == 1 &&
      *PQgetvalue(result, 0, 1) != 't')
    return false;
  if (PQntuples(result) < 1 || PQnfields(result) < 1) return true;
  value = PQgetvalue(result, 0, 0);
  length = PQgetlength(result, 0, 0);
  if (PQgetisnull(result, 0, 0))
    c->answer.value = VALUE_NULL;
  else if (c->draws) {
    s->op.token = strtoull(value, NULL, 10);
    c->answer.value = VALUE_OTHER;
  } else if (c->marks)
    c->answer.value = note_marks(s, c, value, length);
  else if (length == 1)
    c->answer.value = *value == 't' ? VALUE_TRUE : VALUE_FALSE;
  else
    c->answer.value = VALUE_OTHER;
  return true;
}

static void command_lands(const struct command *c) {
  for (struct holding *h = c->leaving.first; h != NULL; h = h->after[LEAVING]) h->releasing--;
}

static void command_answered(struct session *s, struct command *c) {
  bool fatal = c->vital && c->answer.failed;
  bool undecided = c->commits && !c->committed && !c->answer.failed;
  if (c->commits && c->answer.failed) s->commit_failed = true;
  if (c->commits && c->abandoned && c->answer.failed) {
    s->release_failure = c->answer.failure;
    s->release_key = c->key;
  }
  s->oldest = c->next;
  if (s->oldest == NULL) s->newest = &s->oldest;
  if (c->leaving.count > 0) {
    command_lands(c);
    holdings_answered(s, c);
  } else if (!c->abandoned && s->op.kind != NULL) {
    s->op.unanswered--;
    memcpy(&s->op.answer, &c->answer, offsetof(struct answer, failure));
    if (c->answer.failed) s->op.answer.failure = c->answer.failure;
  }
  command_recycle(s, c);
  if (undecided) session_lose(s, UNKNOWN, "", NO_ANSWER_MESSAGE);
  if (fatal)
    session_lose(s, LOST, c->answer.failure.sqlstate, c->answer.failure.message);
}

/* One result of the oldest command. */
static void take_result(struct session *s, PGresult *result) {
  struct command *c = s->oldest;
  switch (PQresultStatus(result)) {
  case PGRES_PIPELINE_SYNC:
    PQclear(result);
    command_answered(s, c);
    return;
  case PGRES_TUPLES_OK:
    if (c->settled) break;
    if (!note_value(s, c, result)) {
      PQclear(result);
      session_lose(s, POOLED, "", "the connection pooler answered from another session than the one"
                                  " that holds the locks; the connection was closed");
      return;
    }
    /* fall through */
  case PGRES_COMMAND_OK:
  case PGRES_EMPTY_QUERY:
    c->committed = c->committed || (PQresultStatus(result) == PGRES_COMMAND_OK &&
                                    strcmp(PQcmdStatus(result), "COMMIT") == 0);
    if (c->commits && strcmp(PQcmdStatus(result), "ROLLBACK") == 0) {
      failure_set(&c->answer.failure, ABORTED_TRANSACTION, "", ROLLED_BACK_MESSAGE);
      c->answer.failed = true;
    }
    if (c->keep_result && !c->abandoned) {
      PQclear(*s->op.result);
      *s->op.result = result;
      result = NULL;
    }
    c->settled = c->announces && (c->results > 0 || !c->prepares);
    break;
  case PGRES_COPY_IN:
  case PGRES_COPY_OUT:
  case PGRES_COPY_BOTH:
    /* There is no way back out of COPY in a pipeline but to close. */
    PQclear(result);
    session_lose(s, SERVER, "0A000", "COPY is not possible here; the connection was closed");
    return;
  case PGRES_PIPELINE_ABORTED:
    break;
  default:
    note_error(s, c, result);
    break;
  }
  c->results++;
  PQclear(result);
}

/* PQisBusy looks at all that has arrived, a notice of the session's end too: so it is asked also where
 * no answer is awaited. */
static void take_results(struct session *s) {
  bool again = true; /* after each query's results libpq says NULL once */
  while (s->pg != NULL && !PQisBusy(s->pg) && s->oldest != NULL) {
    PGresult *result = PQgetResult(s->pg);
    if (result != NULL)
      take_result(s, result);
    else if (!again)
      return;
    again = result != NULL;
  }
}

static void take_notifications(struct session *s) {
  for (PGnotify *n; s->pg != NULL && (n = PQnotifies(s->pg)) != NULL; PQfreemem(n))
    s->notified = true;
}

/* The end of a stream is the server's doing, and its session has ended with it. An error of TCP is
 * not: the server may still hold what it was asked for, and may not have heard what it was told. */
static bool network_failed(const struct session *s, int error) {
  const char *host = PQhost(s->pg);
  return error != 0 && s->pump_fd < 0 && host != NULL && *host != '/' && *host != '@';
}

bool commands_collect(struct session *s) {
  bool readable = true;
  /* A TLS record may hold more than one read takes, and leave nothing for the socket to tell. */
  int reads = s->pg != NULL && PQsslInUse(s->pg) ? 3 : 1;
  /* libpq reads once, and has room for so much at least. */
  bool more = s->pump_fd >= 0 && (s->given > LIBPQ_READS || reads > 1);
  if (s->pump_fd >= 0 && s->given == 0) reads = 0;
  s->given = 0;
  while (s->pg != NULL && readable && (reads-- > 0 || (more && is_ready(PQsocket(s->pg), POLLIN)))) {
    errno = 0;
    readable = PQconsumeInput(s->pg);
    s->broken = s->broken || (!readable && network_failed(s, errno));
    take_results(s);
  }
  take_notifications(s);
  if (s->pg == NULL) return false;
  if (s->doomed)
    session_lose(s, LOST, s->loss.sqlstate, s->loss.message);
  else if (!readable || PQstatus(s->pg) == CONNECTION_BAD)
    session_lose(s, s->broken ? UNKNOWN : LOST, "", PQerrorMessage(s->pg));
  else if (s->oldest == NULL) {
    session_note_transaction(s);
    if (s->rollback_due && s->op.kind == NULL) command_rollback(s, false);
  }
  return s->pg != NULL;
}

void commands_drop(struct session *s) {
  late_lands(s);
  while (s->oldest != NULL) {
    struct command *c = s->oldest;
    s->oldest = c->next;
    command_lands(c);
    command_recycle(s, c);
  }
  s->newest = &s->oldest;
}
