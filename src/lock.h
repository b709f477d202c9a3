/* lock.h: what lock.c, options.c and share.c know of a lock, and nobody else. */
#ifndef PGLOCKS_LOCK_H
#define PGLOCKS_LOCK_H

#include "pglocks.h"

/* A lock in LOCK_HELD is held as long as its session is open and its holding of its generation. */
enum lock_state { LOCK_CLOSED, LOCK_ACQUIRING, LOCK_HELD, LOCK_RELEASED, LOCK_LOST };

struct member {
  struct holding *holding;  /* while held, and afterwards no longer its own */
  unsigned long generation; /* of the holding */
  struct key key;
  const char *name; /* as it was given, in the userdata too; NULL: it was none */
  size_t name_length;
};

struct lock {
  enum magic magic;
  enum lock_state state;
  bool shared, acquired, many; /* many: made by lock_all, be it of one key */
  bool transaction;            /* of its scope */
  bool draws;                  /* a token with every acquire */
  bool joined;                 /* beside another one: on_end is told of its scope's end */
  int slot;                    /* of a semaphore; 0: none */
  unsigned long began;         /* the number of the transaction that began with it; 0: none */
  lua_Integer owner;           /* as it was joined for, to tell apart many of one session; 0: none */
  uint64_t token;
  struct session *session;     /* NULL: collected */
  double waited;               /* seconds */
  size_t count;
  struct member members[]; /* in the order of key_compare, each key once */
};

/* ---- options.c: what a call asks for --------------------------------------------------- */

struct options {
  struct hashing hashing;
  enum { SCOPE_DEFAULT, SCOPE_SESSION, SCOPE_TRANSACTION } scope;
  bool shared, token, patient; /* patient: waits as the Lua files know */
  int slots;                   /* of a semaphore; 0: none */
  double timeout; /* < 0: none */
  int comment;    /* stack index, or 0 */
};

/* The options at 3; 4 is a place for the comment. _all: of lock_all. */
void options_check(lua_State *L, struct options *o);
void options_check_all(lua_State *L, struct options *o);
/* The key at 2, or the list of keys there. The lock is of no connection yet. */
struct lock *lock_make(lua_State *L, bool many, const struct options *o);
void lock_sort(struct lock *lock); /* its members; each key once */
/* The SQL comment that shows an administrator who locks what, and where in the program. text: the index of
 * the caller's own, or of true. */
const char *comment_push(lua_State *L, int text, const struct lock *lock);
void options_open(lua_State *L);

/* ---- lock.c: acquire, guard, release --------------------------------------------------- */

void member_count(struct member *m); /* one more on its holding */
/* What is gone while the session lives went with its transaction, or against the rules. */
enum lock_state lock_state(const struct lock *lock);
void lock_describe(const struct lock *lock, char text[NAME_IN_MESSAGE]);
/* From now on it is one of the connection at `index`, or of that of the lock there. */
void lock_bind(lua_State *L, int lock_index, int index, struct lock *lock, struct session *s);
bool holds_locks(const struct session *s); /* it is open, ours, and not being closed */
/* As its collection does: only sends. */
void release_now(struct session *s, struct lock *lock);
struct lock *lock_check(lua_State *L); /* at 1, of a connection */
/* Puts the connection of the lock at 1 before it. */
struct session *connection_insert(lua_State *L, const struct lock *lock);

/* ---- share.c: many owners on one connection -------------------------------------------- */

void share_open(lua_State *L);

#endif
