/* transaction.c: transactions that locks begin and end, and what ends with them. */
#include "pglocks.h"

#include <string.h>

void transaction_ended(struct session *s) {
  s->in_transaction = s->transaction_failed = s->rollback_due = s->commit_failed = false;
  s->transaction = 0;
  if (!s->joined) return;
  holdings_leave_transaction(s);
  s->joined = false;
}

void transaction_replaced(struct session *s) {
  s->transaction = 0;
  s->joined = s->rollback_due = false;
}

void transaction_note_end(struct session *s, const char *tag) {
  if (!s->joined || !s->in_transaction) return;
  if (strcmp(tag, "COMMIT") == 0) { /* AND CHAIN */
    transaction_ended(s);
    s->in_transaction = true;
  } else if (strcmp(tag, "ROLLBACK") == 0) /* TO SAVEPOINT, or AND CHAIN */
    holdings_verify(s);
}

static int transacting_finish(lua_State *L, struct session *s) {
  struct failure *failure = &s->op.failure;
  if (s->op.demand == COMMITTING && failure->code == LOST)
    failure_set(failure, UNKNOWN, failure->sqlstate,
                "the session was lost when it was to commit, which it did or not: %s",
                failure->message);
  operation_end(L, s);
  if (s->scheduled) connection_tell_free(L, 1);
  lua_pushboolean(L, 1);
  return 1;
}

static const struct operation_kind transacting = {"transaction", false, query_advance,
                                                  transacting_finish};

void commit_begin(struct session *s, const struct key *key, double seconds) {
  struct operation *op = &s->op;
  bool waits = key == NULL || !s->commits_deferred || s->transaction_failed;
  operation_begin(s, &transacting, seconds);
  op->demand = COMMITTING;
  if (key != NULL) {
    op->key = *key;
    op->has_key = true;
  }
  holdings_announce(s, false);
  command_commit(s, waits ? NULL : key);
  if (!waits && !op->done) operation_done(s, NO_ERROR, "", NULL);
}

static void rolling_back_advance(struct session *s) {
  const struct answer *answer = &s->op.answer;
  if (!answer->failed)
    query_advance(s);
  else if (answer->failure.code == INTERRUPTED && s->op.rounds++ < CANCELLED_AT_MOST)
    command_rollback(s, true);
  else
    session_lose(s, LOST, answer->failure.sqlstate, answer->failure.message);
}

static const struct operation_kind rolling_back = {"rollback", false, rolling_back_advance,
                                                   transacting_finish};

void rollback_begin(struct session *s) {
  operation_begin(s, &rolling_back, s->reply_timeout);
  command_rollback(s, true);
}

void rollback_now(struct session *s) {
  if (s->op.kind != NULL)
    s->rollback_due = true;
  else
    command_rollback(s, false);
}

/* begin(conn), commit(conn): of conn:transaction, without a deadline for the COMMIT, which may have
 * much to do. */
static struct session *begin_prepare(lua_State *L) {
  struct session *s = connection_check(L, 1);
  connection_ready(L, 1, s);
  operation_begin(s, &transacting, s->reply_timeout);
  command_begin_transaction(s);
  return s;
}

static struct session *commit_prepare(lua_State *L) {
  struct session *s = connection_check(L, 1);
  connection_ready(L, 1, s);
  commit_begin(s, NULL, INFINITY);
  return s;
}

static int start_begin(lua_State *L) {
  begin_prepare(L);
  return 0;
}

static int start_commit(lua_State *L) {
  commit_prepare(L);
  return 0;
}

static int begin(lua_State *L) { return operation_complete(L, begin_prepare(L)); }

static int commit(lua_State *L) { return operation_complete(L, commit_prepare(L)); }

static const luaL_Reg starters[] = {{"begin", start_begin}, {"commit", start_commit}, {NULL, NULL}};

static const luaL_Reg functions[] = {{"begin", begin}, {"commit", commit}, {NULL, NULL}};

void transaction_open(lua_State *L) {
  luaL_setfuncs(L, functions, 0);
  lua_getfield(L, -1, "start");
  luaL_setfuncs(L, starters, 0);
  lua_pop(L, 1);
}
