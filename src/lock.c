/* lock.c: the lock userdata: acquire, guard, release.
 *
 * An error of an acquire or a release does not say whether the session holds the lock: a
 * lock_timeout or a cancel may strike when the lock has just been granted. So after every error
 * the guard asks pg_locks, and adopts the lock or lets it go, before anybody is told. */
#include "lock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LONG_WAIT 0.1 /* seconds, in which the network may have gone */
#define HASTY 4 /* releases in a row, each sent at once */
#define PATIENTLY "pglocks patiently"

/* Not counted in its holding, or the server does not hold that any more. */
static bool member_lost(const struct member *m) {
  return m->holding->generation != m->generation;
}

void member_count(struct member *m) {
  m->holding->count++;
  m->generation = m->holding->generation;
}

/* What is gone while the session lives went with its transaction, or against the rules. */
enum lock_state lock_state(const struct lock *lock) {
  for (size_t i = 0; lock->state == LOCK_HELD && i < lock->count; i++)
    if (member_lost(&lock->members[i])) return lock->transaction ? LOCK_RELEASED : LOCK_LOST;
  return lock->state;
}

/* The transaction began with this lock, and ends with it. */
static bool owns_transaction(const struct session *s, const struct lock *lock) {
  return lock->state == LOCK_HELD && lock->began != 0 && lock->began == s->transaction &&
         s->state == SESSION_OPEN && !session_is_foreign(s);
}

/* ---- conn:locks() ---------------------------------------------------------------------- */

/* One holding, as it was when the list was made. */
struct listed {
  struct key key;
  bool shared, transaction, has_name;
  int count;
  size_t name, name_length; /* where its name is, among the names */
};

/* How much there is to list; with `to` and `names`, lists it. */
static size_t holdings_list(const struct session *s, struct listed *to, char *names,
                            size_t *names_length) {
  size_t n = 0;
  *names_length = 0;
  for (size_t i = 0; i < s->bucket_count; i++)
    for (const struct holding *h = s->buckets[i]; h != NULL; h = h->next) {
      /* What a failed transaction holds still cannot be asked. */
      if (h->count == 0 || h->internal || (h->transaction && s->transaction_failed)) continue;
      if (to != NULL) {
        struct listed one = {h->key,   h->shared,     h->transaction, h->has_name,
                             h->count, *names_length, h->name_length};
        to[n] = one;
        if (h->name_length > 0) memcpy(names + *names_length, h->name, h->name_length);
      }
      *names_length += h->name_length;
      n++;
    }
  return n;
}

/* From a copy, because Lua may collect garbage meanwhile, locks of this session among it. */
void holdings_push(lua_State *L, const struct session *s, bool any) {
  size_t n = 0, names_length = 0, n_now, length_now;
  struct listed *list = NULL;
  char *names;
  int result = lua_gettop(L) + 1;
  lua_pushnil(L);
  for (;;) {
    n_now = any ? holdings_list(s, NULL, NULL, &length_now) : 0;
    if (n_now == 0 || (list != NULL && n_now <= n && length_now <= names_length)) break;
    n = n_now;
    names_length = length_now;
    list = lua_newuserdata(L, n * sizeof *list + names_length);
  }
  names = n_now > 0 ? (char *)(list + n) : NULL;
  if (n_now > 0) n_now = holdings_list(s, list, names, &length_now);
  lua_createtable(L, (int)n_now, 0);
  for (size_t i = 0; i < n_now; i++) {
    lua_createtable(L, 0, 5);
    key_push(L, &list[i].key);
    lua_setfield(L, -2, "key");
    if (list[i].has_name) {
      lua_pushlstring(L, names + list[i].name, list[i].name_length);
      lua_setfield(L, -2, "name");
    }
    lua_pushstring(L, list[i].shared ? "shared" : "exclusive");
    lua_setfield(L, -2, "mode");
    lua_pushstring(L, list[i].transaction ? "transaction" : "session");
    lua_setfield(L, -2, "scope");
    lua_pushinteger(L, list[i].count);
    lua_setfield(L, -2, "count");
    lua_rawseti(L, -2, (int)i + 1);
  }
  lua_replace(L, result);
  lua_settop(L, result);
}

void lock_describe(const struct lock *lock, char text[NAME_IN_MESSAGE]) {
  const struct member *m = lock->members;
  if (lock->many)
    snprintf(text, NAME_IN_MESSAGE, "%zu key%s", lock->count, lock->count == 1 ? "" : "s");
  else
    key_describe(&m->key, m->name, m->name_length, text, NAME_IN_MESSAGE);
}

/* ---- the guard ------------------------------------------------------------------------- */

/* Of acquire, release and check alike, for the operation's chain of holdings. MAIN is the statement
 * itself; all else follows errors. */
enum state {
  MAIN,
  KEEP,  /* releases the savepoint in which many were got */
  DRAW,  /* draws a token */
  UNDO,  /* puts the user's transaction right, or ends ours, then goes on with op.resume */
  GUARD, /* is it held? adopts it, or lets it go */
  SETTLE /* an earlier release is in doubt: let go what it may have left, then MAIN */
};

static void main_send(struct session *s);
static void conclude(struct session *s);

static void go(struct session *s, enum state state) {
  struct operation *op = &s->op;
  op->state = (int)state;
  op->reply_by = state == MAIN ? INFINITY : monotonic_now() + s->reply_timeout;
  switch (state) {
  case MAIN:
    main_send(s);
    break;
  case KEEP:
    command_simple(s, RELEASE_SAVED, NULL);
    break;
  case DRAW:
    command_token(s);
    break;
  case UNDO:
    if (op->begins) { /* its answer is not needed: what comes next is behind it */
      command_rollback(s, false);
      if (!op->done) go(s, (enum state)op->resume);
    } else
      command_simple(s, ROLL_BACK_TO_SAVED, RELEASE_SAVED);
    break;
  case GUARD:
    if (op->lock != NULL && (op->asked.count == 0 || op->asked.first->transaction)) {
      op->answer.value = VALUE_FALSE; /* of a transaction's scope a rollback leaves nothing */
      conclude(s);
    } else
      command_guard(s, op->guard, &op->asked);
    break;
  case SETTLE:
    command_guard(s, GUARD_UNLOCK, &op->asked);
    break;
  }
}

/* A statement failed: goes to `state`, by way of the savepoint inside a transaction. */
static void recover(struct session *s, enum state state) {
  s->op.resume = (int)state;
  go(s, s->in_transaction ? UNDO : state);
}

static void finished(struct session *s, enum code code, const char *message) {
  holdings_unask(s);
  operation_done(s, code, s->op.failure.sqlstate, "%s", message);
}

static void trust_asked(struct session *s) {
  for (struct holding *h = s->op.asked.first; h != NULL; h = h->after[ASKED]) holding_trust(s, h);
}

static bool doubts_asked(const struct session *s) {
  const struct holding *h = s->doubtful > 0 ? s->op.asked.first : NULL;
  while (h != NULL && !h->doubtful) h = h->after[ASKED];
  return h != NULL;
}

/* The guard's own answers. True: it is not MAIN that was answered. */
static bool settling(struct session *s) {
  struct operation *op = &s->op;
  bool found = op->answer.value == VALUE_TRUE || op->answer.value == VALUE_SOME;
  if (op->state == MAIN || op->state == KEEP || op->state == DRAW) return false;
  if (op->answer.failed && op->answer.failure.code == INTERRUPTED &&
      op->rounds++ < CANCELLED_AT_MOST) {
    if (op->state == UNDO) /* its savepoint is still there */
      go(s, UNDO);
    else
      recover(s, (enum state)op->state);
  } else if (op->answer.failed &&
             (op->state == UNDO || op->answer.failure.code == ABORTED_TRANSACTION)) {
    /* No savepoint to go back to: the transaction was aborted before the statement ran, perhaps by a
     * release before it that failed; and the guard must wait for its end. */
    for (struct holding *h = op->asked.first; h != NULL; h = h->after[ASKED])
      if (h->count == 0 && !h->transaction) holding_doubt(s, h);
    finished(s, ABORTED_TRANSACTION, op->answer.failure.message);
  } else if (op->answer.failed)
    session_lose(s, UNKNOWN, op->answer.failure.sqlstate, op->answer.failure.message);
  else if (op->state == UNDO)
    go(s, (enum state)op->resume);
  else if (!found && op->answer.value != VALUE_FALSE)
    session_lose(s, UNKNOWN, "", NO_ANSWER_MESSAGE);
  else if (op->state == GUARD && op->guard == GUARD_LOOK)
    conclude(s);
  else if (found) { /* unlocked once: look again */
    for (struct holding *h = op->asked.first; h != NULL; h = h->after[ASKED]) h->untouched = false;
    go(s, (enum state)op->state);
  } else {
    trust_asked(s);
    if (op->state == GUARD)
      conclude(s);
    else
      go(s, MAIN);
  }
  return true;
}

/* ---- acquire --------------------------------------------------------------------------- */

static const struct operation_kind acquiring;

/* The server reads the guard of that release only when the wait has ended: so the wait is
 * cancelled, and begun again behind the guard. */
void acquire_step_aside(struct session *s) {
  struct operation *op = &s->op;
  if (op->kind == &acquiring && !op->done && op->state == MAIN && op->unanswered > 0 &&
      op->timeout != 0 && !op->interrupted && !op->aside && op->rounds < CANCELLED_AT_MOST)
    op->aside = operation_cancel(s);
}

enum demand { DEMAND_LOCK, DEMAND_TRY, DEMAND_ATTEMPT };

static void refused(struct session *s) {
  struct operation *op = &s->op;
  const struct lock *lock = op->lock;
  char key[NAME_IN_MESSAGE];
  if (op->interrupted && op->failure.code != INTERRUPTED)
    failure_set(&op->failure, INTERRUPTED, "", "interrupted");
  if (op->failure.code != TIMEOUT) {
    finished(s, op->failure.code, op->failure.message);
    return;
  }
  lock_describe(lock, key);
  if (op->timeout > 0)
    snprintf(op->failure.message, MESSAGE_SIZE, "no lock on %s within %.7g s", key, op->timeout);
  else
    snprintf(op->failure.message, MESSAGE_SIZE, "no lock on %s: somebody holds %s", key,
             lock->count > 1 ? "one of them" : "it");
  finished(s, TIMEOUT, op->failure.message);
}

enum { MILLISECONDS_SIZE = 11 }; /* of any uint32_t, with the NUL */

/* By hand, because snprintf takes longer than the rest of an acquire. */
static void put_digits(char text[MILLISECONDS_SIZE], uint32_t n) {
  char digits[MILLISECONDS_SIZE], *first = digits + sizeof digits - 1;
  *first = '\0';
  do *--first = (char)('0' + n % 10);
  while ((n /= 10) > 0);
  memcpy(text, first, (size_t)(digits + sizeof digits - first));
}

static void acquire_send(struct session *s) {
  struct operation *op = &s->op;
  bool transaction = op->asked.first->transaction, timed = op->timeout > 0;
  enum verb verb = (transaction ? VERB_XACT_LOCK : VERB_LOCK) +
                   (op->timeout < 0 ? VERB_LOCK : timed ? VERB_LOCK_TIMED : VERB_TRY);
  char milliseconds[MILLISECONDS_SIZE];
  if (op->interrupted) { /* between two attempts */
    refused(s);
    return;
  }
  op->begins = transaction && !s->in_transaction;
  if (timed) {
    double left = op->timeout;
    if (op->rounds > 0) left += op->started - monotonic_now();
    /* a whole number and at least 1: 0 would mean for ever */
    put_digits(milliseconds, (uint32_t)fmax(1, ceil(left * 1000)));
  }
  command_statement(s, verb, &op->asked, timed ? milliseconds : NULL,
                    op->comment);
}

static bool was_got(const struct session *s, const struct holding *h) {
  return !s->op.each || s->op.answer.value == VALUE_TRUE ||
         (s->op.answer.value == VALUE_SOME && h->found[ASKED]);
}

static void count_members(struct session *s, struct lock *lock) {
  for (size_t i = 0; i < lock->count; i++) {
    struct member *m = &lock->members[i];
    if (!member_lost(m) || !was_got(s, m->holding)) continue;
    if (m->holding->count == 0) {
      m->holding->since = s->op.started + lock->waited;
      m->holding->announces = ANNOUNCES_ITSELF;
    }
    member_count(m);
  }
  if (lock->transaction) s->joined = true;
}

static void granted(struct session *s) {
  struct operation *op = &s->op;
  struct lock *lock = op->lock;
  if (lock->draws && op->token == 0) {
    lock->waited = monotonic_now() - op->started;
    op->aside = false; /* a cancel from now on is meant for us */
    go(s, DRAW);
    return;
  }
  if (!lock->draws) lock->waited = monotonic_now() - op->started;
  /* Where nothing of ours reaches the server any more, it repeats the grant, which for TCP is a sign
   * of life: only what we send ourselves, and nobody acknowledges, tells us so in time. */
  if (lock->waited > LONG_WAIT) command_nothing(s);
  if (op->done) return; /* lost */
  if (lock->transaction && s->oldest == NULL && !s->in_transaction) {
    session_lose(s, UNKNOWN, "", "the server granted the lock outside a transaction; the connection was closed");
    return;
  }
  count_members(s, lock);
  if (op->begins) lock->began = s->transaction = ++s->transactions;
  lock->token = op->token;
  lock->state = LOCK_HELD;
  lock->acquired = true;
  op->failure.code = NO_ERROR;
  finished(s, NO_ERROR, "");
}

/* Of those that were tried each for itself. What a failed statement got before it failed is got. */
static void got_some(struct session *s) {
  s->op.lock->waited = monotonic_now() - s->op.started; /* from now on they are held */
  count_members(s, s->op.lock);
  s->op.lock->state = LOCK_HELD;
  finished(s, s->op.failure.code, s->op.failure.message);
}

static bool is_answer(const struct operation *op) {
  enum value value = op->answer.value;
  const struct chain *asked = &op->asked;
  if (op->timeout == 0)
    return value == VALUE_TRUE || value == VALUE_FALSE || (op->each && value == VALUE_SOME);
  return value == (asked->count > 1 || (op->timeout > 0 && asked->first->transaction)
                       ? VALUE_TRUE
                       : VALUE_OTHER);
}

static void let_go(struct session *s) {
  s->op.guard = GUARD_UNLOCK;
  recover(s, GUARD);
}

/* Of a try of many inside the user's transaction. */
static bool keeps_savepoint(const struct operation *op) {
  return op->timeout == 0 && op->asked.count > 1 && op->asked.first->transaction && !op->begins;
}

/* Interrupted when it was granted. What has joined the user's transaction cannot be let go, unless its
 * savepoint is still there. */
static void interrupted(struct session *s) {
  struct operation *op = &s->op;
  bool stays = op->lock->transaction && !op->begins &&
               !(op->state == MAIN && keeps_savepoint(op));
  failure_set(&op->failure, INTERRUPTED, "", "interrupted%s",
              stays ? "; the lock is held until the transaction ends" : "");
  if (stays) {
    count_members(s, op->lock);
    refused(s);
  } else if (op->lock->transaction)
    let_go(s);
  else { /* the statement has ended well: there is no savepoint to go back to */
    op->guard = GUARD_UNLOCK;
    go(s, GUARD);
  }
}

/* What was drawn in a statement that failed may be lost in a crash, and so be drawn again. */
static void drawn(struct session *s) {
  struct operation *op = &s->op;
  bool failed = op->answer.failed, never_ran = failed && failure_never_ran(&op->answer.failure);
  if (never_ran && !op->interrupted && op->rounds++ < CANCELLED_AT_MOST) {
    go(s, DRAW);
    return;
  }
  if (!failed && op->answer.value != VALUE_OTHER && op->answer.value != VALUE_NULL) {
    session_lose(s, UNKNOWN, "", NO_ANSWER_MESSAGE);
    return;
  }
  if (!failed && !op->interrupted && op->token != 0) {
    granted(s);
    return;
  }
  if (failed && !(never_ran && op->interrupted)) /* it would be begun again */
    op->failure = op->answer.failure;
  else if (op->interrupted)
    failure_set(&op->failure, INTERRUPTED, "", "interrupted");
  else if (op->answer.value == VALUE_NULL)
    failure_set(&op->failure, SERVER, "",
                "no token: where fsync is off, they may repeat after a crash");
  else
    failure_set(&op->failure, STANDBY, "", "no token: a standby cannot draw one");
  op->token = 0;
  let_go(s);
}

static void acquire_advance(struct session *s) {
  struct operation *op = &s->op;
  if (settling(s)) return;
  if (op->state == DRAW) {
    drawn(s);
    return;
  }
  if (op->answer.failed) {
    op->failure = op->answer.failure;
    /* A release in doubt before us may have left the server counting 2: adopt no such lock. */
    op->guard = (op->failure.code == TIMEOUT || op->each) && !op->interrupted && !doubts_asked(s)
                    ? GUARD_LOOK
                    : GUARD_UNLOCK;
    recover(s, GUARD);
  } else if (op->state == KEEP) {
    if (op->interrupted)
      interrupted(s);
    else
      granted(s);
  } else if (!is_answer(op)) {
    session_lose(s, UNKNOWN, "", NO_ANSWER_MESSAGE);
  } else if (doubts_asked(s)) {
    /* The release before us went wrong, so that the server may count 2: from the start again. */
    op->rounds++;
    go(s, SETTLE);
  } else if (op->each && !op->interrupted) {
    got_some(s);
  } else if (op->answer.value == VALUE_FALSE) {
    failure_set(&op->failure, TIMEOUT, "", "%s", "");
    if (op->begins || keeps_savepoint(op))
      let_go(s);
    else
      refused(s);
  } else if (op->interrupted)
    interrupted(s);
  else if (keeps_savepoint(op))
    go(s, KEEP);
  else
    granted(s);
}

/* The lock that is acquired, to the top of the stack: where a call blocks, it has stayed there. */
static void take_pending(lua_State *L, const struct lock *lock) {
  if (lua_touserdata(L, -1) == lock) return;
  slot_get(L, 1, SLOT_PENDING);
  lua_pushboolean(L, 0);
  slot_set(L, 1, SLOT_PENDING);
}

static void lock_leave(struct session *s, struct lock *lock, struct chain *chain);

/* Gives back what was counted at once. Nothing is sent for it while the operation goes on. */
static void uncount(struct session *s, struct lock *lock) {
  struct chain nothing = {.kind = LEAVING};
  for (size_t i = 0; lock->transaction && i < lock->count; i++) {
    struct member *m = &lock->members[i];
    if (!member_lost(m) && m->holding->count > 1) m->holding->count--;
  }
  lock_leave(s, lock, &nothing);
  lock->state = LOCK_CLOSED;
}

static int acquire_finish(lua_State *L, struct session *s) {
  struct operation *op = &s->op;
  struct lock *lock = op->lock;
  enum demand demand = (enum demand)op->demand;
  bool waited = op->timeout > 0;
  take_pending(L, lock);
  if (op->failure.code == NO_ERROR && lock->transaction && s->rollback_due)
    failure_set(&op->failure, ABORTED_TRANSACTION, "",
                "the lock that began the transaction was let go: it is rolled back");
  if (op->each && op->failure.code != NO_ERROR && lock->state == LOCK_HELD && s->state == SESSION_OPEN) {
    struct failure failure = op->failure;
    operation_drop(s);
    failure_push(L, &failure, NULL);
    return 2;
  }
  if (op->failure.code != NO_ERROR) uncount(s, lock);
  if (op->failure.code == TIMEOUT && demand != DEMAND_LOCK) {
    operation_drop(s);
    if (demand == DEMAND_ATTEMPT) return 1;
    lua_pushnil(L);
    lua_pushstring(L, waited ? "timeout" : "busy");
    return 2;
  }
  operation_end(L, s);
  if (s->state == SESSION_LOST) { /* in the moment of the grant */
    connection_tell_loss(L, 1, s);
    failure_push(L, &s->loss, lock->many ? NULL : &lock->members[0].key);
    return lua_error(L);
  }
  return 1;
}

static const struct operation_kind acquiring = {"lock", true, acquire_advance, acquire_finish};

/* From now on it is one of the connection at `index`, or of that of the lock there. */
void lock_bind(lua_State *L, int lock_index, int index, struct lock *lock,
                      struct session *s) {
  push_environment(L, index);
  set_environment(L, lock_index);
  lock->session = s;
  s->refs++;
}

/* The lock exists, closed, before anything is sent: nothing that Lua may refuse comes after. */
static struct lock *lock_new(lua_State *L, struct session *s, bool many, const struct options *o) {
  struct lock *lock = lock_make(L, many, o);
  push_environment(L, 1);
  lua_rawgeti(L, -1, SLOT_LOCK);
  lua_setmetatable(L, -3);
  lua_pop(L, 1);
  lock_bind(L, lua_gettop(L), 1, lock, s);
  return lock;
}

/* What the lock is to hold. False: no memory. */
static bool find_holdings(struct session *s, struct lock *lock) {
  for (size_t i = 0; i < lock->count; i++) {
    struct member *m = &lock->members[i];
    struct holding *h = m->holding = holding_get(s, &m->key, lock->shared,
                                                  lock->transaction);
    if (h != NULL && (h->count > 0 || holding_set_name(h, m->name, m->name_length))) continue;
    for (size_t made = 0; made <= i; made++)
      if (lock->members[made].holding != NULL) holding_put(s, lock->members[made].holding);
    return false;
  }
  return true;
}

static bool holds_all(const struct lock *lock) {
  size_t i = 0;
  while (i < lock->count && lock->members[i].holding->count > 0) i++;
  return i == lock->count;
}

/* The server would count a key twice, and show it once: so a connection has it in one scope. */
static void scopes_check(lua_State *L, struct session *s, const struct lock *lock) {
  if (!lock->transaction && !s->joined) return;
  for (size_t i = 0; i < lock->count; i++)
    if (holding_in_scope(s, &lock->members[i].key, !lock->transaction))
      argument_error(L, 2, lock->transaction
                               ? "option 'scope': this connection holds the key in session scope"
                               : "option 'scope': this connection holds the key until its transaction ends");
}

/* Raises what only the connection can know about the options. */
static void demands_check(lua_State *L, struct session *s, const struct options *o) {
  const char *message = NULL;
  enum code code = SERVER;
  if (s->pooling == TRANSACTION_POOLING && o->scope != SCOPE_TRANSACTION) {
    code = POOLED;
    message = "a lock of session scope cannot be had behind a pooler of transactions";
  } else if (o->token && s->pooling == TRANSACTION_POOLING) {
    code = POOLED;
    message = "a token cannot be had behind a pooler of transactions";
  } else if (o->token && s->in_transaction)
    message = "a token cannot be drawn inside a transaction: when that commits, later ones may have been drawn";
  if (message != NULL) raise_failure(L, code, message);
}

/* Asks the server about what is not ours already. What is ours is counted at once: while this lock waits
 * for the rest, the scope of another one on it may end. */
static void ask_for_all(struct session *s, struct lock *lock) {
  for (size_t i = 0; i < lock->count; i++)
    if (lock->members[i].holding->count == 0)
      chain_add(&s->op.asked, lock->members[i].holding);
    else
      member_count(&lock->members[i]);
}

/* Connection, key or keys, options; leaves the lock at the top. The server enforces the timeout; the
 * client's deadline behind it is for a server that does not answer. NULL: nothing was begun, because it
 * is for `wait_patiently`. */
static struct session *acquire_begin(lua_State *L, enum demand demand, bool many) {
  struct session *s;
  struct options o;
  struct lock *lock;
  const char *comment = NULL;
  lua_settop(L, 4);
  s = connection_check(L, 1);
  if (many)
    options_check_all(L, &o);
  else
    options_check(L, &o);
  if (o.slots > 0 && demand == DEMAND_ATTEMPT)
    argument_error(L, 2, "option 'slots': not with wait = false");
  if (demand != DEMAND_LOCK && o.timeout < 0) o.timeout = 0;
  if (o.slots > 0 || (o.patient && o.timeout != 0)) return NULL;
  if (o.scope == SCOPE_DEFAULT && s->pooling == TRANSACTION_POOLING) o.scope = SCOPE_TRANSACTION;
  lock = lock_new(L, s, many, &o);
  if (o.comment != 0) comment = comment_push(L, o.comment, lock);
  connection_ready(L, 1, s); /* last, because a collection may have done anything to it */
  demands_check(L, s, &o);
  scopes_check(L, s, lock);
  if (comment != NULL) slot_set(L, 1, SLOT_COMMENT);
  if (!command_reserve(s, lock->count) || !find_holdings(s, lock)) {
    luaL_error(L, "not enough memory");
    return NULL; /* not reached */
  }
  if (holds_all(lock) && !session_alive(s)) connection_ready(L, 1, s); /* raises lost */

  operation_begin(s, &acquiring, o.timeout < 0 ? INFINITY : o.timeout + s->reply_timeout);
  s->op.lock = lock;
  s->op.key = lock->members[0].key;
  s->op.has_key = !many;
  s->op.demand = (int)demand;
  s->op.timeout = o.timeout;
  s->op.comment = comment;
  lock->state = LOCK_ACQUIRING;
  ask_for_all(s, lock);
  if (s->op.asked.count == 0 && !(lock->transaction && s->transaction_failed))
    granted(s); /* ours already: the server is not asked to count */
  else if (s->transaction_failed)
    finished(s, ABORTED_TRANSACTION, "the transaction is aborted: nothing was locked");
  else
    go(s, doubts_asked(s) ? SETTLE : MAIN);
  return s;
}

/* patiently(fn): what fn(conn, method, key, options) does is done for the options `slots` and `strategy`. */
static int patiently(lua_State *L) {
  luaL_checktype(L, 1, LUA_TFUNCTION);
  lua_settop(L, 1);
  lua_setfield(L, LUA_REGISTRYINDEX, PATIENTLY);
  return 0;
}

static int wait_patiently(lua_State *L, const char *method) {
  lua_settop(L, 3);
  lua_getfield(L, LUA_REGISTRYINDEX, PATIENTLY);
  lua_insert(L, 1);
  lua_pushstring(L, method);
  lua_insert(L, 3);
  lua_call(L, 4, LUA_MULTRET);
  return lua_gettop(L);
}

static int acquire(lua_State *L, enum demand demand, bool many, const char *method) {
  struct session *s = acquire_begin(L, demand, many);
  return s != NULL ? operation_complete(L, s) : wait_patiently(L, method);
}

static int connection_lock(lua_State *L) { return acquire(L, DEMAND_LOCK, false, "lock"); }

static int connection_try_lock(lua_State *L) { return acquire(L, DEMAND_TRY, false, "try_lock"); }

static int connection_lock_all(lua_State *L) { return acquire(L, DEMAND_LOCK, true, "lock_all"); }

static int connection_try_lock_all(lua_State *L) {
  return acquire(L, DEMAND_TRY, true, "try_lock_all");
}

/* attempt(conn, key, options): as try_lock, but a lock object either way: `acquired` tells. */
static int attempt(lua_State *L) { return acquire(L, DEMAND_ATTEMPT, false, "attempt"); }

/* True: nothing was begun, because it is for the function that `patiently` has set. */
static int acquire_start(lua_State *L, enum demand demand, bool many) {
  bool begun = acquire_begin(L, demand, many) != NULL;
  if (begun) slot_set(L, 1, SLOT_PENDING);
  lua_pushboolean(L, !begun);
  return 1;
}

static int start_lock(lua_State *L) { return acquire_start(L, DEMAND_LOCK, false); }

static int start_try_lock(lua_State *L) { return acquire_start(L, DEMAND_TRY, false); }

static int start_lock_all(lua_State *L) { return acquire_start(L, DEMAND_LOCK, true); }

static int start_try_lock_all(lua_State *L) { return acquire_start(L, DEMAND_TRY, true); }

static int start_attempt(lua_State *L) { return acquire_start(L, DEMAND_ATTEMPT, false); }

/* try_each(conn, locks): tries the keys of closed locks, all of one mode, each for itself. `finish` returns
 * one lock on those that it got, for others to join, and the error if the statement failed. */
static int start_try_each(lua_State *L) {
  struct session *s = connection_check(L, 1);
  size_t count = lua_rawlen(L, 2);
  struct lock *lock;
  luaL_checktype(L, 2, LUA_TTABLE);
  luaL_argcheck(L, count > 0, 2, "at least one lock expected");
  lock = new_userdata(L, sizeof *lock + count * sizeof *lock->members);
  memset(lock, 0, sizeof *lock);
  lock->magic = LOCK_MAGIC;
  lock->many = true;
  lock->count = count;
  luaL_setmetatable(L, LOCK_TYPE);
  for (size_t i = 0; i < count; i++) {
    struct lock *one;
    lua_rawgeti(L, 2, (int)i + 1);
    one = check_userdata(L, -1, LOCK_TYPE, sizeof *one, LOCK_MAGIC);
    lock->shared = one->shared;
    lock->members[i] = one->members[0];
    lua_pop(L, 1); /* the list keeps it, and its name */
  }
  lock_sort(lock);
  lock_bind(L, 3, 1, lock, s);
  connection_ready(L, 1, s);
  scopes_check(L, s, lock);
  if (!command_reserve(s, lock->count) || !find_holdings(s, lock))
    return luaL_error(L, "not enough memory");
  for (size_t i = 0; i < lock->count; i++) lock->members[i].name = NULL;
  operation_begin(s, &acquiring, s->reply_timeout);
  s->op.lock = lock;
  s->op.demand = DEMAND_LOCK; /* it raises what it cannot say of each */
  s->op.timeout = 0;
  s->op.each = true;
  lock->state = LOCK_ACQUIRING;
  ask_for_all(s, lock);
  if (s->op.asked.count == 0)
    got_some(s);
  else
    go(s, doubts_asked(s) ? SETTLE : MAIN);
  slot_set(L, 1, SLOT_PENDING);
  return 0;
}

/* ---- release --------------------------------------------------------------------------- */

static void release_advance(struct session *s) {
  struct operation *op = &s->op;
  if (settling(s)) return;
  if (op->answer.failed) {
    bool again = failure_never_ran(&op->answer.failure) && op->rounds++ == 0;
    op->guard = GUARD_UNLOCK;
    recover(s, again ? MAIN : GUARD);
  } else if (op->answer.value == VALUE_TRUE)
    finished(s, NO_ERROR, "");
  else if (op->answer.value == VALUE_FALSE || op->answer.value == VALUE_SOME) {
    const struct holding *h = op->asked.first;
    while (h->found[ASKED]) h = h->after[ASKED];
    op->key = h->key;
    op->has_key = true;
    finished(s, NOT_HELD, NOT_HELD_MESSAGE);
  } else
    session_lose(s, UNKNOWN, "", NO_ANSWER_MESSAGE);
}

enum { RELEASE_DONE, RELEASE_OF_NOTHING, RELEASE_OF_JOINED };

static int release_finish(lua_State *L, struct session *s) {
  int demand = s->op.demand;
  operation_end(L, s);
  if (s->scheduled) connection_tell_free(L, 1);
  if (demand == RELEASE_OF_NOTHING) {
    lua_pushnil(L);
    lua_pushliteral(L, "not held");
    return 2;
  }
  lua_pushboolean(L, 1);
  if (demand != RELEASE_OF_JOINED) return 1;
  lua_pushliteral(L, "held until the transaction ends");
  return 2;
}

static const struct operation_kind releasing = {"release", false, release_advance,
                                                release_finish};

/* Ours to hold locks: close() has let go of all. */
bool holds_locks(const struct session *s) {
  return s->state == SESSION_OPEN && !s->closing && !session_is_foreign(s);
}

/* Lets go of a lock. What the server must let go then is added to the chain, or in doubt. */
static void lock_leave(struct session *s, struct lock *lock, struct chain *chain) {
  bool ours = holds_locks(s);
  /* Behind a try of others', too; but not in the way of a cancel, which may strike what comes next. */
  bool behind = s->op.kind == &releasing || (s->op.each && s->op.lock != lock && s->cancel == NULL);
  bool sends = !s->transaction_failed && (s->op.kind == NULL || behind);
  double now = monotonic_now();
  lock->state = LOCK_RELEASED;
  if (lock->transaction) return; /* what it holds ends with that */
  for (size_t i = 0; i < lock->count; i++) {
    struct member *m = &lock->members[i];
    struct holding *h = m->holding;
    if (member_lost(m)) continue;
    h->count--;
    if (h->count == 0) holding_left(s, h, now);
    if (ours && h->count == 0 && sends) {
      chain_add(chain, h);
      continue;
    }
    /* Refused until the transaction has ended, or behind another's operation, where the server would
     * not read it sooner: the guard lets it go when that is over. */
    if (ours && h->count == 0) {
      h->untouched = h->untouched || !h->doubtful;
      holding_doubt(s, h);
    }
    holding_put(s, h);
  }
}

/* Without waiting for the answer. */
void release_now(struct session *s, struct lock *lock) {
  struct chain chain = {.kind = LEAVING};
  bool ends = owns_transaction(s, lock);
  lock_leave(s, lock, &chain);
  if (ends) rollback_now(s);
  if (chain.count > 0) command_statement(s, VERB_UNLOCK, &chain, NULL, NULL);
  if (s->op.kind == NULL) notify_settle(s);
}

/* As release_now; but of many in a row, all but the first are sent together: by the next command, or by
 * send_late. The first are not, because nobody knows how long the program keeps its event loop waiting. */
static void release_late(struct session *s, struct lock *lock) {
  const struct key *key = &lock->members[0].key;
  struct chain *late = &s->late;
  int before;
  if (lock->count > 1 || lock->transaction || s->hasty++ < HASTY) {
    release_now(s, lock);
    return;
  }
  if (late->count > 0 && ((size_t)late->count == s->packed_for || late->last->shared != lock->shared ||
                          late->last->key.objsubid != key->objsubid))
    command_late(s);
  before = late->count;
  lock_leave(s, lock, late);
  if (late->count > before) late->last->releasing++;
}

/* The session must be free. */
static void release_begin(struct session *s, struct lock *lock) {
  struct operation *op = &s->op;
  if (owns_transaction(s, lock) && lock_state(lock) == LOCK_HELD) {
    lock->state = LOCK_RELEASED;
    commit_begin(s, &lock->members[0].key, s->reply_timeout);
    op->has_key = !lock->many;
    return;
  }
  operation_begin(s, &releasing, s->reply_timeout);
  op->key = lock->members[0].key;
  op->has_key = !lock->many;
  if (lock_state(lock) == LOCK_LOST) {
    release_now(s, lock); /* of many keys, some may still be held */
    if (!op->done) operation_done(s, LOST, "", NOT_HELD_MESSAGE);
  } else if (lock_state(lock) != LOCK_HELD || s->state == SESSION_CLOSED) {
    op->demand = RELEASE_OF_NOTHING;
    operation_done(s, NO_ERROR, "", NULL);
  } else if (s->state == SESSION_LOST) {
    release_now(s, lock);
    operation_done(s, LOST, s->loss.sqlstate, "%s", s->loss.message);
  } else if (lock->transaction) {
    lock->state = LOCK_RELEASED;
    op->demand = RELEASE_OF_JOINED;
    operation_done(s, NO_ERROR, "", NULL);
  } else if (s->deferred) {
    release_now(s, lock);
    if (!op->done) operation_done(s, NO_ERROR, "", NULL);
  } else {
    lock_leave(s, lock, &op->asked);
    if (op->asked.count > 0)
      go(s, MAIN);
    else
      operation_done(s, NO_ERROR, "", NULL);
  }
}

/* ---- check ----------------------------------------------------------------------------- */

enum { CHECK_OF_SESSION, CHECK_OF_JOINED };

static void check_advance(struct session *s) { settling(s); }

static int check_finish(lua_State *L, struct session *s) {
  if (s->op.failure.code == NO_ERROR && s->op.demand == CHECK_OF_JOINED && s->rollback_due)
    failure_set(&s->op.failure, NOT_HELD, "", "this lock is not held");
  operation_end(L, s);
  lua_pushboolean(L, 1);
  return 1;
}

static const struct operation_kind checking = {"check", true, check_advance, check_finish};

static void check_begin(struct session *s, struct lock *lock, double timeout) {
  struct operation *op = &s->op;
  operation_begin(s, &checking, timeout);
  op->key = lock->members[0].key;
  op->has_key = !lock->many;
  op->guard = GUARD_LOOK;
  op->demand = lock->transaction ? CHECK_OF_JOINED : CHECK_OF_SESSION;
  if (lock_state(lock) == LOCK_HELD && s->state == SESSION_LOST)
    operation_done(s, LOST, s->loss.sqlstate, "%s", s->loss.message);
  else if (lock_state(lock) == LOCK_LOST)
    operation_done(s, LOST, "", NOT_HELD_MESSAGE);
  else if (lock_state(lock) != LOCK_HELD || s->state != SESSION_OPEN)
    operation_done(s, NOT_HELD, "", "this lock is not held");
  else if (s->transaction_failed)
    operation_done(s, ABORTED_TRANSACTION, "", "the transaction is aborted: nothing was asked");
  else {
    for (size_t i = 0; i < lock->count; i++) chain_add(&op->asked, lock->members[i].holding);
    go(s, GUARD);
  }
}

static void main_send(struct session *s) {
  if (s->op.kind == &releasing)
    command_statement(s, VERB_UNLOCK, &s->op.asked, NULL, NULL);
  else
    acquire_send(s);
}

static void conclude_check(struct session *s) {
  bool released = false, lost = false; /* released: meanwhile, by the end of its scope */
  for (struct holding *h = s->op.asked.first; h != NULL; h = h->after[ASKED])
    if (h->count == 0)
      released = true;
    else if (!h->found[ASKED]) {
      lost = true;
      holding_lost(s, h);
    }
  finished(s, released ? NOT_HELD : lost ? LOST : NO_ERROR,
           released ? "this lock is not held" : NOT_HELD_MESSAGE);
}

/* What the guard found out. */
static void conclude(struct session *s) {
  struct operation *op = &s->op;
  enum value held = op->answer.value;
  if (op->kind == &checking)
    conclude_check(s);
  else if (op->kind == &releasing)
    finished(s, NO_ERROR, "");
  else if (op->each && op->guard == GUARD_LOOK && !op->interrupted &&
           !(failure_never_ran(&op->failure) && op->rounds == 0))
    got_some(s);
  else if (held == VALUE_SOME || (held == VALUE_TRUE && op->interrupted)) {
    op->guard = GUARD_UNLOCK;
    go(s, GUARD);
  } else if (held == VALUE_TRUE)
    granted(s);
  else if (op->aside && !op->interrupted && op->failure.code == INTERRUPTED) {
    op->aside = false;
    op->rounds++;
    holdings_settle(s);
    if (!op->done) go(s, MAIN);
  } else if (failure_never_ran(&op->failure) && op->rounds++ == 0)
    go(s, MAIN);
  else
    refused(s);
}

/* ---- methods --------------------------------------------------------------------------- */

struct lock *lock_check(lua_State *L) {
  struct lock *lock = check_userdata(L, 1, LOCK_TYPE, sizeof *lock, LOCK_MAGIC);
  if (lock->session == NULL) luaL_argerror(L, 1, "this lock was collected");
  return lock;
}

/* Puts the connection of the lock at 1 before it. */
struct session *connection_insert(lua_State *L, const struct lock *lock) {
  push_environment(L, 1);
  lua_rawgeti(L, -1, SLOT_CONNECTION);
  lua_insert(L, 1);
  lua_pop(L, 1);
  return lock->session;
}

/* Before an operation on a lock: what is over is told by the operation itself. */
static void lock_ready(lua_State *L, struct session *s) {
  if (session_is_foreign(s) || s->op.kind != NULL || s->state == SESSION_OPEN)
    connection_ready(L, 1, s);
  else
    connection_tell_loss(L, 1, s);
}

static struct session *release_prepare(lua_State *L) {
  struct lock *lock = lock_check(L);
  struct session *s = connection_insert(L, lock);
  /* What is only counted here, or not waited for, is no occasion to hear of a loss. */
  if (lock_state(lock) == LOCK_HELD && (s->deferred || lock->members[0].holding->count > 1))
    session_alive(s);
  lock_ready(L, s);
  release_begin(s, lock);
  return s;
}

static int lock_release(lua_State *L) { return operation_complete(L, release_prepare(L)); }

/* start.release(lock): the connection to drive. */
static int start_release(lua_State *L) {
  release_prepare(L);
  lua_settop(L, 1);
  return 1;
}

static struct session *check_prepare(lua_State *L) {
  struct lock *lock = lock_check(L);
  double timeout = lock->session->reply_timeout;
  struct session *s;
  if (!lua_isnoneornil(L, 2)) timeout = timeout_check(L, 2, 1, "timeout");
  s = connection_insert(L, lock);
  lock_ready(L, s);
  check_begin(s, lock, timeout);
  return s;
}

static int lock_confirm(lua_State *L) { return operation_complete(L, check_prepare(L)); }

static int start_check(lua_State *L) {
  check_prepare(L);
  lua_settop(L, 1);
  return 1;
}

static int lock_held(lua_State *L) {
  struct lock *lock = lock_check(L);
  struct session *s = connection_insert(L, lock);
  lua_pushboolean(L, session_alive(s) && lock_state(lock) == LOCK_HELD &&
                         !(lock->transaction && s->transaction_failed));
  connection_tell_loss(L, 1, s);
  return 1;
}

/* Whoever had it join decides who holds next. Once: what is called may end the scope itself. */
static void tell_end(lua_State *L, struct lock *lock) {
  if (!lock->joined || lock_state(lock) != LOCK_HELD || !holds_locks(lock->session)) return;
  lock->joined = false;
  connection_insert(L, lock);
  connection_tell_end(L, 1);
  lua_remove(L, 1);
}

/* __close: as release(), but never raises. */
static int lock_scope_end(lua_State *L) {
  struct lock *lock = test_userdata(L, 1, sizeof *lock, LOCK_MAGIC);
  struct session *s = lock != NULL ? lock->session : NULL;
  if (s == NULL || lock->state != LOCK_HELD) return 0;
  lua_settop(L, 1);
  tell_end(L, lock);
  if (lock->state != LOCK_HELD) return 0;
  if (s->op.kind != NULL || s->scheduled || session_is_foreign(s))
    release_now(s, lock);
  else {
    if (owns_transaction(s, lock)) {
      lock->state = LOCK_RELEASED;
      rollback_begin(s);
    } else
      release_begin(s, lock);
    operation_run(L, s, s->op.started);
    if (s->op.failure.code == NOT_HELD) { /* nobody else would tell */
      s->release_failure = s->op.failure;
      s->release_key = s->op.key;
    }
    operation_drop(s);
  }
  if (session_is_untold(s) || s->scheduled) {
    connection_insert(L, lock);
    connection_tell_loss(L, 1, s);
    connection_tell_free(L, 1);
  }
  return 0;
}

/* __gc: only sends. */
static int lock_collect(lua_State *L) {
  struct lock *lock = test_userdata(L, 1, sizeof *lock, LOCK_MAGIC);
  struct session *s = lock != NULL ? lock->session : NULL;
  if (s == NULL) return 0;
  tell_end(L, lock);
  if (lock->state == LOCK_HELD)
    release_now(s, lock);
  else if (s->op.lock == lock) /* its connection goes too: nobody can drive the acquire on */
    session_lose(s, LOST, "", "the acquire was abandoned");
  lock->state = LOCK_RELEASED;
  lock->session = NULL;
  session_unref(s);
  return 0;
}

static void keys_push(lua_State *L, const struct lock *lock) {
  lua_createtable(L, (int)lock->count, 0);
  for (size_t i = 0; i < lock->count; i++) {
    key_push(L, &lock->members[i].key);
    lua_rawseti(L, -2, (int)i + 1);
  }
}

static int lock_index(lua_State *L) {
  struct lock *lock = test_userdata(L, 1, sizeof *lock, LOCK_MAGIC);
  const struct member *m;
  const char *field;
  lua_settop(L, 2);
  if (method_push(L, lock != NULL && lock->session != NULL && lock->session->scheduled)) return 1;
  lock = check_userdata(L, 1, LOCK_TYPE, sizeof *lock, LOCK_MAGIC);
  field = lua_type(L, 2) == LUA_TSTRING ? lua_tostring(L, 2) : "";
  m = lock->members;
  if (strcmp(field, "acquired") == 0)
    lua_pushboolean(L, lock->acquired);
  else if (strcmp(field, "shared") == 0)
    lua_pushboolean(L, lock->shared);
  else if (strcmp(field, "key") == 0)
    lock->many ? lua_pushnil(L) : key_push(L, &m->key);
  else if (strcmp(field, "keys") == 0)
    keys_push(L, lock);
  else if (strcmp(field, "name") == 0)
    lock->many || m->name == NULL ? lua_pushnil(L)
                                  : (void)lua_pushlstring(L, m->name, m->name_length);
  else if (strcmp(field, "waited") == 0)
    lua_pushnumber(L, lock->waited);
  else if (strcmp(field, "slot") == 0 && lock->slot > 0)
    lua_pushinteger(L, lock->slot);
  else if (strcmp(field, "scope") == 0)
    lua_pushstring(L, lock->transaction ? "transaction" : "session");
  else if (strcmp(field, "token") == 0 && lock->token != 0)
    push_exact(L, (int64_t)lock->token);
  return 1;
}

static int lock_tostring(lua_State *L) {
  static const char *const states[] = {"not held", "waited for", "held", "released", "lost"};
  struct lock *lock = lock_check(L);
  enum lock_state state = lock_state(lock);
  char key[NAME_IN_MESSAGE];
  if (state == LOCK_HELD && lock->session->state != SESSION_OPEN)
    state = lock->session->state == SESSION_LOST ? LOCK_LOST : LOCK_RELEASED;
  lock_describe(lock, key);
  lua_pushfstring(L, LOCK_TYPE ": %s, %s, %s", key, lock->shared ? "shared" : "exclusive",
                  states[state]);
  return 1;
}

static int connection_locks(lua_State *L) {
  struct session *s = connection_check(L, 1);
  bool open = session_alive(s);
  connection_tell_loss(L, 1, s);
  holdings_push(L, s, open);
  return 1;
}

static const luaL_Reg lock_metamethods[] = {{"__close", lock_scope_end},
                                            {"__gc", lock_collect},
                                            {"__tostring", lock_tostring},
                                            {NULL, NULL}};

static const luaL_Reg lock_methods[] = {
    {"check", lock_confirm}, {"held", lock_held}, {"release", lock_release}, {NULL, NULL}};

static const luaL_Reg connection_methods[] = {{"lock", connection_lock},
                                              {"lock_all", connection_lock_all},
                                              {"locks", connection_locks},
                                              {"try_lock", connection_try_lock},
                                              {"try_lock_all", connection_try_lock_all},
                                              {NULL, NULL}};

static const luaL_Reg starters[] = {{"attempt", start_attempt},
                                    {"check", start_check},
                                    {"lock", start_lock},
                                    {"lock_all", start_lock_all},
                                    {"release", start_release},
                                    {"try_lock", start_try_lock},
                                    {"try_each", start_try_each},
                                    {"try_lock_all", start_try_lock_all},
                                    {NULL, NULL}};

/* connection_of(lock) */
static int connection_of(lua_State *L) {
  connection_insert(L, lock_check(L));
  lua_settop(L, 1);
  return 1;
}

/* exchange(lock, other): two locks of one connection on the same keys give each other what they hold, so
 * that a lock changes its mode. False: one of them is not held any more. */
static int exchange(lua_State *L) {
  struct lock *lock = lock_check(L);
  struct lock *other = check_userdata(L, 2, LOCK_TYPE, sizeof *other, LOCK_MAGIC);
  bool held = lock->session == other->session && lock->count == other->count &&
              lock_state(lock) == LOCK_HELD && lock_state(other) == LOCK_HELD;
  bool shared = lock->shared;
  for (size_t i = 0; held && i < lock->count; i++) {
    struct member *a = &lock->members[i], *b = &other->members[i], kept = *a;
    /* Only for conn:locks(): without memory for it the name is missing there. */
    if (a->name != NULL && !b->holding->has_name)
      holding_set_name(b->holding, a->name, a->name_length);
    a->holding = b->holding;
    a->generation = b->generation;
    b->holding = kept.holding;
    b->generation = kept.generation;
  }
  if (held) {
    lock->shared = other->shared;
    other->shared = shared;
    lock->token = other->token;
  }
  lua_pushboolean(L, held);
  return 1;
}

/* let_go(lock, late): as its collection does: only sends. late: perhaps only with the next command, or by
 * send_late. */
static int let_go_now(lua_State *L) {
  struct lock *lock = lock_check(L);
  if (lock->state != LOCK_HELD) return 0;
  if (lua_toboolean(L, 2))
    release_late(lock->session, lock);
  else
    release_now(lock->session, lock);
  return 0;
}

/* send_late(conn): what was let go, and has not been sent. */
static int send_late(lua_State *L) {
  struct session *s = connection_check(L, 1);
  command_late(s);
  return 0;
}

/* holds(conn, key): in session scope, in any mode? */
static int holds(lua_State *L) {
  struct session *s = connection_check(L, 1);
  const struct key *key = key_test(L, 2);
  if (key == NULL) luaL_argerror(L, 2, "key expected");
  lua_pushboolean(L, holding_in_scope(s, key, false));
  return 1;
}

/* annotate(lock, { waited =, slot =, announces =, internal = }): announces: the marker to announce the end
 * of the lock with, however soon that comes; false: it is not announced. internal: it is in no list. */
static int annotate(lua_State *L) {
  struct lock *lock = lock_check(L);
  const struct key *marker;
  bool internal;
  luaL_checktype(L, 2, LUA_TTABLE);
  lua_getfield(L, 2, "waited");
  if (!lua_isnil(L, -1)) lock->waited = luaL_checknumber(L, -1);
  lua_getfield(L, 2, "slot");
  if (!lua_isnil(L, -1)) lock->slot = (int)luaL_checkinteger(L, -1);
  lua_getfield(L, 2, "internal");
  internal = lua_toboolean(L, -1);
  lua_getfield(L, 2, "announces");
  marker = key_test(L, -1);
  for (size_t i = 0; i < lock->count; i++) {
    struct holding *h = lock->members[i].holding;
    if (member_lost(&lock->members[i])) continue;
    if (internal) h->internal = true;
    if (lua_isnil(L, -1)) continue;
    h->announces = marker != NULL ? ANNOUNCES_OTHER : ANNOUNCES_NOTHING;
    if (marker != NULL) h->announced = *marker;
  }
  return 0;
}

static const luaL_Reg functions[] = {{"annotate", annotate},
                                     {"attempt", attempt},
                                     {"connection_of", connection_of},
                                     {"exchange", exchange},
                                     {"holds", holds},
                                     {"let_go", let_go_now},
                                     {"patiently", patiently},
                                     {"send_late", send_late},
                                     {NULL, NULL}};

void lock_open(lua_State *L) {
  luaL_setfuncs(L, functions, 0);
  options_open(L);
  share_open(L);
  lua_getfield(L, -1, "start");
  luaL_setfuncs(L, starters, 0);
  lua_getfield(L, -2, "connection");
  luaL_setfuncs(L, connection_methods, 0);
  lua_pop(L, 2);
  luaL_newmetatable(L, LOCK_TYPE);
  luaL_setfuncs(L, lock_metamethods, 0);
  lua_getfield(L, -2, "lock");
  luaL_setfuncs(L, lock_methods, 0);
  lua_getfield(L, -3, "scheduled");
  lua_getfield(L, -1, "lock");
  lua_remove(L, -2);
  lua_pushcclosure(L, lock_index, 2);
  lua_setfield(L, -2, "__index");
  lua_pop(L, 1);
}
