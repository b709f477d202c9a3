/* holding.c: what a session holds, counted here: the server never holds a key and mode more than
 * once for us. And the releases that went wrong, until the guard has settled them. */
#include "pglocks.h"

#include <stdlib.h>
#include <string.h>

static size_t bucket_of(const struct session *s, const struct key *key, bool shared,
                        bool transaction) {
  uint64_t h = (uint64_t)key->classid << 32 | key->objid;
  h = (h ^ (uint64_t)key->objsubid << 2 ^ (uint64_t)transaction << 1 ^ shared) * 0x9e3779b97f4a7c15u;
  return (size_t)(h >> 32) & (s->bucket_count - 1);
}

static struct holding **holding_find(struct session *s, const struct key *key, bool shared,
                                     bool transaction) {
  struct holding **h = &s->buckets[bucket_of(s, key, shared, transaction)];
  while (*h != NULL && !((*h)->shared == shared && (*h)->transaction == transaction &&
                         key_equal(&(*h)->key, key)))
    h = &(*h)->next;
  return h;
}

static struct holding **holding_place(struct session *s, const struct holding *h) {
  return holding_find(s, &h->key, h->shared, h->transaction);
}

bool holding_in_scope(struct session *s, const struct key *key, bool transaction) {
  const struct holding *exclusive = *holding_find(s, key, false, transaction);
  const struct holding *shared = *holding_find(s, key, true, transaction);
  return (exclusive != NULL && exclusive->count > 0) || (shared != NULL && shared->count > 0);
}

static bool is_leaving(const struct holding *h) {
  return h != NULL && (h->releasing > 0 || h->doubtful);
}

bool holding_leaves(struct session *s, const struct key *key) {
  return is_leaving(*holding_find(s, key, false, false)) || is_leaving(*holding_find(s, key, true, false));
}

/* More buckets; without memory for them the chains just grow longer. */
static void holdings_grow(struct session *s) {
  size_t old_count = s->bucket_count;
  struct holding **old = s->buckets, **more = calloc(old_count * 4, sizeof *more);
  if (more == NULL) return;
  s->buckets = more;
  s->bucket_count = old_count * 4;
  for (size_t i = 0; i < old_count; i++)
    while (old[i] != NULL) {
      struct holding *h = old[i], **to = holding_place(s, h);
      old[i] = h->next;
      h->next = *to;
      *to = h;
    }
  if (old != s->first_buckets) free(old);
}

/* The holding of a key and mode, made where there is none; NULL without memory. */
struct holding *holding_get(struct session *s, const struct key *key, bool shared,
                            bool transaction) {
  struct holding **at, *h;
  if (s->holding_count >= s->bucket_count * 2) holdings_grow(s);
  at = holding_find(s, key, shared, transaction);
  if (*at != NULL) return *at;
  h = s->spare_holdings; /* with nothing on it, but for its buffer */
  if (h != NULL)
    s->spare_holdings = h->next;
  else if ((h = calloc(1, sizeof *h)) == NULL)
    return NULL;
  h->next = NULL;
  h->key = *key;
  h->shared = shared;
  h->transaction = transaction;
  h->internal = false;
  h->generation = ++s->generations;
  *at = h;
  s->holding_count++;
  return h;
}

bool holding_set_name(struct holding *h, const char *name, size_t length) {
  if (length > h->name_size) {
    char *larger = realloc(h->name, length);
    if (larger == NULL) return false;
    h->name = larger;
    h->name_size = length;
  }
  if (length > 0) memcpy(h->name, name, length);
  h->name_length = length;
  h->has_name = name != NULL;
  return true;
}

void holding_left(struct session *s, struct holding *h, double now) {
  struct key marker;
  if (h->announces == ANNOUNCES_OTHER)
    announce(s, &h->announced);
  else if (h->announces == ANNOUNCES_ITSELF && now - h->since > ANNOUNCED_AFTER) {
    if (marker_of(&h->key, &marker)) announce(s, &marker);
  }
  h->announces = ANNOUNCES_NOTHING; /* again */
}

void holdings_announce(struct session *s, bool all) {
  double now = monotonic_now();
  for (size_t i = 0; (all || s->joined) && i < s->bucket_count; i++)
    for (struct holding *h = s->buckets[i]; h != NULL; h = h->next)
      if ((all || h->transaction) && h->count > 0) holding_left(s, h, now);
}

void holding_lost(struct session *s, struct holding *h) {
  h->count = 0;
  h->generation = ++s->generations;
}

/* Forgets a holding that nothing is held, in flight, in doubt or to be told of. */
void holding_put(struct session *s, struct holding *h) {
  struct holding **at;
  if (h->count > 0 || h->releasing > 0 || h->doubtful || h->denied || h->asked) return;
  at = holding_place(s, h);
  *at = h->next;
  h->next = s->spare_holdings;
  s->spare_holdings = h;
  s->holding_count--;
}

void holding_doubt(struct session *s, struct holding *h) {
  if (!h->doubtful) s->doubtful++;
  h->doubtful = true;
}

void holding_trust(struct session *s, struct holding *h) {
  if (!h->doubtful) return;
  h->doubtful = h->untouched = false;
  if (--s->doubtful == 0) s->settle_rounds = 0;
}

void chain_add(struct chain *chain, struct holding *h) {
  if (chain->last == NULL)
    chain->first = h;
  else
    chain->last->after[chain->kind] = h;
  chain->last = h;
  h->after[chain->kind] = NULL;
  chain->count++;
  chain->pairs += h->key.objsubid == 2;
  if (chain->kind == ASKED) h->asked = true;
}

void holdings_unask(struct session *s) {
  struct holding *h = s->op.asked.first, *after;
  s->op.asked = (struct chain){.kind = ASKED};
  for (; h != NULL; h = after) {
    after = h->after[ASKED];
    h->asked = false;
    holding_put(s, h);
  }
}

static bool any_of_transaction(const struct session *s) {
  for (size_t i = 0; i < s->bucket_count; i++)
    for (const struct holding *h = s->buckets[i]; h != NULL; h = h->next)
      if (h->transaction && h->count > 0) return true;
  return false;
}

/* What the server was asked about after a statement of the user's that may have taken it away. */
static void holdings_looked_at(struct session *s, const struct command *command) {
  struct holding *h, *after;
  for (h = command->leaving.first; h != NULL; h = after) {
    after = h->after[LEAVING];
    if (!h->found[LEAVING]) holding_lost(s, h);
    holding_put(s, h);
  }
  if (!any_of_transaction(s)) transaction_replaced(s);
}

void holdings_answered(struct session *s, const struct command *command) {
  const struct answer *answer = &command->answer;
  bool failed = answer->failed || (answer->value != VALUE_TRUE && answer->value != VALUE_SOME &&
                                   answer->value != VALUE_FALSE);
  bool never_ran = answer->failed && failure_never_ran(&answer->failure);
  struct holding *h, *after;
  if (command->looks) { /* when it fails the session is lost */
    if (!failed)
      holdings_looked_at(s, command);
    else if (!answer->failed)
      session_lose(s, UNKNOWN, "", NO_ANSWER_MESSAGE);
    return;
  }
  for (h = command->leaving.first; h != NULL; h = h->after[LEAVING])
    if (failed) {
      h->untouched = (h->untouched || !h->doubtful) && never_ran;
      holding_doubt(s, h);
    } else {
      if (!h->denied && !h->found[LEAVING] && (!command->settles || h->untouched)) {
        h->denied = true;
        s->denied++;
      }
      holding_trust(s, h);
    }
  if (failed) acquire_step_aside(s);
  for (h = command->leaving.first; h != NULL; h = after) {
    after = h->after[LEAVING];
    holding_put(s, h);
  }
}

bool holdings_pop_denied(struct session *s, struct key *key) {
  for (size_t i = 0; s->denied > 0 && i < s->bucket_count; i++)
    for (struct holding *h = s->buckets[i]; h != NULL; h = h->next)
      if (h->denied) {
        h->denied = false;
        s->denied--;
        *key = h->key;
        holding_put(s, h);
        return true;
      }
  return false;
}

bool holdings_any(const struct session *s) {
  for (size_t i = 0; s->holding_count > 0 && i < s->bucket_count; i++)
    for (const struct holding *h = s->buckets[i]; h != NULL; h = h->next)
      if (h->count > 0) return true;
  return false;
}

/* Of one kind of key and mode, as many as there is room for: GUARD_UNLOCK those in doubt, GUARD_LOOK
 * for those of the transaction's scope. False: there was none. */
static bool guard_some(struct session *s, enum guard guard, int objsubid, bool shared) {
  struct chain chain = {.kind = LEAVING};
  for (size_t i = 0; i < s->bucket_count; i++)
    for (struct holding *h = s->buckets[i]; h != NULL; h = h->next)
      if ((guard == GUARD_UNLOCK ? h->doubtful : h->transaction && h->count > 0) &&
          h->releasing == 0 && h->key.objsubid == objsubid && h->shared == shared &&
          (size_t)chain.count < s->packed_for)
        chain_add(&chain, h);
  if (chain.count > 0) command_guard(s, guard, &chain);
  return chain.count > 0;
}

static bool guard_all(struct session *s, enum guard guard) {
  bool sent = false;
  for (int kind = 0; kind < 4; kind++)
    while (s->pg != NULL && guard_some(s, guard, 1 + kind / 2, kind % 2)) sent = true;
  return sent;
}

void holdings_verify(struct session *s) { guard_all(s, GUARD_LOOK); }

void holdings_leave_transaction(struct session *s) {
  holdings_announce(s, false);
  for (size_t i = 0; i < s->bucket_count; i++)
    for (struct holding *h = s->buckets[i], *next; h != NULL; h = next) {
      next = h->next;
      if (!h->transaction || h->count == 0) continue;
      holding_lost(s, h);
      holding_put(s, h);
    }
}

void holdings_settle(struct session *s) {
  if (s->doubtful == 0 || s->transaction_failed) return;
  if (guard_all(s, GUARD_UNLOCK) && s->settle_rounds++ > CANCELLED_AT_MOST)
    session_lose(s, LOST, "", "a release could not be settled; the connection was closed");
}

void holdings_free(struct session *s) {
  for (size_t i = 0; i <= s->bucket_count; i++) {
    struct holding *h = i < s->bucket_count ? s->buckets[i] : s->spare_holdings, *next;
    for (; h != NULL; h = next) {
      next = h->next;
      free(h->name);
      free(h);
    }
  }
  if (s->buckets != s->first_buckets) free(s->buckets);
}
