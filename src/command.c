/* command.c: commands in flight: what is sent, and what comes back.
 *
 * libpq runs in pipeline mode. A command is everything up to one Sync, so that an error in it
 * skips the rest of it and nothing else; its answers come back in the order sent. */
#include "pglocks.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define NO_STATEMENT (-1)
#define SQL_SIZE 1536 /* room for any of ours, with a comment */

enum { INT4_OID = 23, INT8_OID = 20, TEXT_OID = 25 };

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

/* Everything is qualified: a role that may create functions must not hijack a lock. */
static const struct statement statements[STATEMENTS] = {
    VERB_STATEMENTS("pglocks_lock", "pg_advisory_lock"),
    {"pglocks_timed_8", TIMED_SQL("pg_advisory_lock", "$1", "$2")},
    {"pglocks_timed_44", TIMED_SQL("pg_advisory_lock", "$1,$2", "$3")},
    {"pglocks_timed_shared_8", TIMED_SQL("pg_advisory_lock_shared", "$1", "$2")},
    {"pglocks_timed_shared_44", TIMED_SQL("pg_advisory_lock_shared", "$1,$2", "$3")},
    VERB_STATEMENTS("pglocks_try", "pg_try_advisory_lock"),
    VERB_STATEMENTS("pglocks_unlock", "pg_advisory_unlock"),
};

/* The guard looks for the lock in pg_locks before it unlocks: unlocking what is not held would
 * write a warning to the server's log at every ordinary timeout. */
#define OWN_LOCK(mode, objsubid)                                                                 \
  "EXISTS (SELECT 1 FROM pg_catalog.pg_locks l"                                                  \
  " WHERE l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()"                              \
  " AND l.locktype OPERATOR(pg_catalog.=) 'advisory' AND l.granted"                              \
  " AND l.mode OPERATOR(pg_catalog.=) '" mode "'"                                                \
  " AND l.classid OPERATOR(pg_catalog.=) $1 AND l.objid OPERATOR(pg_catalog.=) $2"               \
  " AND l.objsubid OPERATOR(pg_catalog.=) " objsubid ")"
/* A 64-bit key is put together from its halves, so that both kinds have the same parameters. */
#define OID_KEY                                                                                  \
  "((($1::pg_catalog.int8) OPERATOR(pg_catalog.<<) 32)"                                          \
  " OPERATOR(pg_catalog.|) ($2::pg_catalog.int8))"
#define OID_INT4(n)                                                                              \
  "((($" n "::pg_catalog.int8) OPERATOR(pg_catalog.<<) 32)"                                      \
  " OPERATOR(pg_catalog.>>) 32)::pg_catalog.int4"
#define GUARDS(mode, f)                                                                          \
  {                                                                                              \
    {"SELECT CASE WHEN " OWN_LOCK(mode, "1") " THEN true END",                                   \
     "SELECT CASE WHEN " OWN_LOCK(mode, "2") " THEN true END"},                                  \
    {                                                                                            \
      "SELECT CASE WHEN " OWN_LOCK(mode, "1") " THEN pg_catalog." f "(" OID_KEY ") END",         \
          "SELECT CASE WHEN " OWN_LOCK(mode, "2") " THEN pg_catalog." f "(" OID_INT4("1") ","    \
              OID_INT4("2") ") END"                                                              \
    }                                                                                            \
  }

static const char *const guards[2][2][2] = {/* shared, guard, pair */
                                            GUARDS("ExclusiveLock", "pg_advisory_unlock"),
                                            GUARDS("ShareLock", "pg_advisory_unlock_shared")};

/* ---- sending --------------------------------------------------------------------------- */

static void command_recycle(struct session *s, struct command *c) {
  c->next = s->spare_commands;
  s->spare_commands = c;
}

/* Queues a command whose messages are being written; command_end sends it. */
static struct command *command_begin(struct session *s, struct holding *holding) {
  struct command *c;
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
  memset(c, 0, offsetof(struct command, answer));
  c->answer.failed = false;
  c->answer.value = NO_VALUE;
  c->answer.failure.code = NO_ERROR;
  c->holding = holding;
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
  if (c->holding != NULL)
    c->holding->releasing++;
  else if (!c->abandoned)
    s->op.unanswered++;
}

static bool send_sql(struct session *s, const char *sql) {
  return PQsendQueryParams(s->pg, sql, 0, NULL, NULL, NULL, NULL, 0);
}

/* In the user's transaction a savepoint keeps our statement from aborting or changing it: what
 * the statement set, its lock_timeout, goes with the savepoint; a session lock stays. */
static bool send_before(struct session *s) {
  return !s->in_transaction || send_sql(s, "SAVEPOINT pglocks");
}

static bool send_after(struct session *s) {
  return !s->in_transaction || (send_sql(s, "ROLLBACK TO SAVEPOINT pglocks") &&
                                send_sql(s, "RELEASE SAVEPOINT pglocks"));
}

static void put_uint32(char *to, uint32_t n) {
  to[0] = (char)(n >> 24);
  to[1] = (char)(n >> 16);
  to[2] = (char)(n >> 8);
  to[3] = (char)n;
}

/* Behind a pooler another session may answer, and hold locks of others: there a statement acts only
 * in the session that it is meant for, and a second column says whether that was it. */
static const char *in_own_session(const struct session *s, const char *sql, char buffer[SQL_SIZE]) {
  static const char own[] = "pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) ";
  if (!s->pooled) return sql;
  snprintf(buffer, SQL_SIZE, "SELECT CASE WHEN %s%d THEN (%s) END, %s%d", own, s->backend_pid, sql,
           own, s->backend_pid);
  return buffer;
}

void command_statement(struct session *s, enum verb verb, const struct key *key, bool shared,
                       const char *milliseconds, const char *comment, struct holding *holding) {
  bool pair = key->objsubid == 2;
  int id = (int)verb * 4 + shared * 2 + pair;
  int n = 1 + pair;
  bool written = true, prepared = comment == NULL && !s->pooled;
  char binary[8], sql[SQL_SIZE], own[SQL_SIZE];
  const char *values[3] = {binary, binary + 4, NULL};
  Oid types[3] = {INT4_OID, INT4_OID, TEXT_OID};
  int lengths[3] = {4, 4, 0}, formats[3] = {1, 1, 0};
  struct command *c = command_begin(s, holding);
  if (c == NULL) return;
  put_uint32(binary, key->classid);
  put_uint32(binary + 4, key->objid);
  if (!pair) {
    types[0] = INT8_OID;
    lengths[0] = 8;
  }
  if (milliseconds != NULL) {
    types[n] = TEXT_OID;
    values[n] = milliseconds;
    formats[n] = 0;
    n++;
  }
  if (prepared) {
    c->statement = id;
    if (!(s->prepared & (1u << id))) {
      written = PQsendPrepare(s->pg, statements[id].name, statements[id].sql, n, types);
      s->prepared |= 1u << id;
      c->prepares = true;
    }
  }
  written = written && send_before(s);
  if (prepared)
    written = written && PQsendQueryPrepared(s->pg, statements[id].name, n, values, lengths,
                                             formats, 0);
  else { /* a comment is of one call: such a statement is not worth preparing */
    int length = snprintf(sql, sizeof sql, "%s%s", comment != NULL ? comment : "",
                          in_own_session(s, statements[id].sql, own));
    written = written && length > 0 && (size_t)length < sizeof sql &&
              PQsendQueryParams(s->pg, sql, n, types, values, lengths, formats, 0);
  }
  command_end(s, c, written && send_after(s));
}

void command_guard(struct session *s, enum guard guard, const struct key *key, bool shared,
                   struct holding *settles) {
  static const Oid types[2] = {26, 26}; /* oid: what pg_locks has */
  char binary[8], own[SQL_SIZE];
  const char *sql, *values[2] = {binary, binary + 4};
  const int lengths[2] = {4, 4}, formats[2] = {1, 1};
  struct command *c = command_begin(s, settles);
  bool written;
  if (c == NULL) return;
  c->settles = true;
  put_uint32(binary, key->classid);
  put_uint32(binary + 4, key->objid);
  sql = in_own_session(s, guards[shared][guard][key->objsubid == 2], own);
  written = send_before(s) &&
            PQsendQueryParams(s->pg, sql, 2, types, values, lengths, formats, 0) && send_after(s);
  command_end(s, c, written);
}

void command_simple(struct session *s, const char *first, const char *second) {
  struct command *c = command_begin(s, NULL);
  if (c == NULL) return;
  command_end(s, c, send_sql(s, first) && (second == NULL || send_sql(s, second)));
}

void command_unlock_all(struct session *s) {
  char own[SQL_SIZE];
  const char *unlock = in_own_session(s, "SELECT pg_catalog.pg_advisory_unlock_all()", own);
  if (s->in_transaction)
    command_simple(s, "ROLLBACK", unlock);
  else
    command_simple(s, unlock, NULL);
}

void command_query(struct session *s, const char *sql, int nparams, const char *const *values) {
  struct command *c = command_begin(s, NULL);
  if (c == NULL) return;
  c->keep_result = true;
  command_end(s, c,
                     PQsendQueryParams(s->pg, sql, nparams, NULL, values, NULL, NULL, 0));
}

void command_sync(struct session *s) {
  struct command *c = command_begin(s, NULL);
  if (c != NULL) command_end(s, c, true);
}

void command_nothing(struct session *s) {
  struct command *c = command_begin(s, NULL);
  if (c == NULL) return;
  c->abandoned = true;
  command_end(s, c, true);
}

void command_rollback(struct session *s) {
  struct command *c = command_begin(s, NULL);
  if (c == NULL) return;
  c->abandoned = c->vital = true;
  command_end(s, c, send_sql(s, "ROLLBACK"));
  if (s->pg == NULL) return;
  s->in_transaction = s->transaction_failed = false;
  holdings_settle(s);
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
  c->answer.failed = true;
  /* Not prepared, or dropped by somebody (DISCARD ALL, DEALLOCATE): prepare it anew. Without a
   * SQLSTATE it is libpq that had no memory for the answer, and the server has prepared it. */
  if (c->statement != NO_STATEMENT &&
      ((c->prepares && c->results == 0 && *sqlstate != '\0') || strcmp(sqlstate, "26000") == 0))
    s->prepared &= ~(1u << c->statement);
  if (severity != NULL && (strcmp(severity, "FATAL") == 0 || strcmp(severity, "PANIC") == 0)) {
    s->doomed = true;
    s->loss = *failure;
  }
}

/* False: another session answered than the one that the command was meant for. */
static bool note_value(struct session *s, struct command *c, const PGresult *result) {
  if (s->pooled && !c->keep_result && PQnfields(result) == 2 && PQntuples(result) == 1 &&
      *PQgetvalue(result, 0, 1) != 't')
    return false;
  if (PQntuples(result) < 1 || PQnfields(result) < 1) return true;
  if (PQgetisnull(result, 0, 0))
    c->answer.value = VALUE_NULL;
  else if (PQgetlength(result, 0, 0) == 1)
    c->answer.value = *PQgetvalue(result, 0, 0) == 't' ? VALUE_TRUE : VALUE_FALSE;
  else
    c->answer.value = VALUE_OTHER;
  return true;
}

static void command_answered(struct session *s, struct command *c) {
  bool fatal = c->vital && c->answer.failed;
  s->oldest = c->next;
  if (s->oldest == NULL) s->newest = &s->oldest;
  if (c->holding != NULL) {
    c->holding->releasing--;
    holding_answered(s, c);
  } else if (!c->abandoned && s->op.kind != NULL) {
    s->op.unanswered--;
    s->op.answer = c->answer;
  }
  command_recycle(s, c);
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
    if (!note_value(s, c, result)) {
      PQclear(result);
      session_lose(s, POOLED, "", "the connection pooler answered from another session than the one"
                                  " that holds the locks; the connection was closed");
      return;
    }
    /* fall through */
  case PGRES_COMMAND_OK:
  case PGRES_EMPTY_QUERY:
    if (c->keep_result && !c->abandoned) {
      PQclear(*s->op.result);
      *s->op.result = result;
      result = NULL;
    }
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
  if (s->pg == NULL) return false;
  if (s->doomed)
    session_lose(s, LOST, s->loss.sqlstate, s->loss.message);
  else if (!readable || PQstatus(s->pg) == CONNECTION_BAD)
    session_lose(s, s->broken ? UNKNOWN : LOST, "", PQerrorMessage(s->pg));
  else if (s->oldest == NULL)
    session_note_transaction(s);
  return s->pg != NULL;
}

void commands_drop(struct session *s) {
  while (s->oldest != NULL) {
    struct command *c = s->oldest;
    s->oldest = c->next;
    if (c->holding != NULL) c->holding->releasing--;
    command_recycle(s, c);
  }
  s->newest = &s->oldest;
}
