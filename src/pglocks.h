/* pglocks.h: what the files of pglocks.core share, under the file that owns it.
 *
 *   session     a connection to PostgreSQL, shared by its userdata and its locks (session.c)
 *   command     messages up to one Sync, in flight on a session (command.c)
 *   operation   what a caller waits for: one or more commands, and what follows from
 *               their answers (operation.c drives it, its kind decides)
 *   holding     a (key, mode) that the session holds or is about to; counts the locks on it.
 *               A chain of them is what one command is about (holding.c)
 *   lock        a userdata, one for every acquire, over one holding or many (lock.c);
 *               connection (connection.c), too
 *   key         what PostgreSQL locks (key.c); a scheme makes it of a name (scheme.c, digest.c)
 *
 * Two rules keep locks true. Everything an operation needs from Lua is allocated before
 * anything is sent; and no Lua function is called while a PGresult is in a C variable. */
#ifndef PGLOCKS_H
#define PGLOCKS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* ppoll, dup3, dladdr */
#endif

#include <math.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include <libpq-fe.h>

#include "compat.h"

#define CONNECTION_TYPE "pglocks connection"
#define LOCK_TYPE "pglocks lock"
#define KEY_TYPE "pglocks key"
#define ERROR_TYPE "pglocks error"

#define NAME_IN_MESSAGE 160 /* bytes of a name that a message or a comment shows, with the NUL */

/* ---- digest.c ------------------------------------------------------------------------- */

uint32_t digest_fnv1_32(const char *bytes, size_t length);
uint64_t digest_fnv1_64(const char *bytes, size_t length);
uint64_t digest_fnv1a_64(const char *bytes, size_t length);
/* hashtextextended(text, seed); its low half is hashtext(text) where the seed is 0. */
uint64_t digest_postgres(const char *bytes, size_t length, int64_t seed);
/* BLAKE2b with a digest of eight bytes, little-endian. */
uint64_t digest_blake2b(const char *bytes, size_t length);
/* String.hashCode of a text in UTF-8, that follows the text of which *hash is. False: no UTF-8. */
bool digest_java(const char *bytes, size_t length, uint32_t *hash);

/* ---- scheme.c ------------------------------------------------------------------------- */

/* As pg_locks shows it: objsubid 1 is a 64-bit key (classid its high half), 2 a pair. */
struct key {
  uint32_t classid, objid;
  uint8_t objsubid;
};

struct text {
  const char *text; /* with a NUL behind it, and perhaps in it */
  size_t length;
};

/* A namespace as it was given: a list of strings is a number, by space_seed. */
struct space {
  enum { SPACE_NONE, SPACE_TEXT, SPACE_NUMBER, SPACE_LIST } is;
  struct text text;
  int64_t number; /* 0 where there is none */
};

struct scheme {
  const char *name;
  enum { TAKES_NONE, TAKES_TEXT, TAKES_TEXTS, TAKES_INT32, TAKES_INT64 } takes;
  /* NULL, or what is wrong. The space has been adopted. */
  const char *(*make)(const struct text *name, const struct space *space, struct key *key);
};

void schemes_open(void); /* once in a process */
const struct scheme *scheme_default(void);
const struct scheme *scheme_find(const char *name); /* NULL: there is none of that name */
/* Makes a namespace one of the scheme. NULL, or what the scheme takes instead. */
const char *scheme_adopt(const struct scheme *scheme, struct space *space);
/* What `namespace` makes of the seed that the one before it has made; of the first, 0. */
int64_t space_seed(int64_t seed, const char *namespace, size_t length);

/* ---- key.c ---------------------------------------------------------------------------- */

/* How a call turns a name into a key; all zero: as the defaults say. */
struct hashing {
  const struct scheme *scheme; /* NULL: a function of the user's, in the options or the defaults */
  struct space space;
  bool explicit_scheme, explicit_space; /* given in the call, not by setup */
  bool beside; /* the options stand beside the key, in one argument; otherwise in the next one */
};

/* Reads the key at `index`, the user's argument `argument`, or raises; of a list, its `element`, or
 * 0. A `hash` that is a function, in the options at `options` or in the defaults, is called. */
void key_check(lua_State *L, int index, int options, int argument, int element,
               const struct hashing *how, struct key *key);
/* One option of a call: true if `option` was "hash" or "namespace"; its value is at `index`. */
bool key_option(lua_State *L, const char *option, int index, int argument, struct hashing *how);
void key_push(lua_State *L, const struct key *key);
const struct key *key_test(lua_State *L, int index); /* of a key object; or NULL */
bool key_equal(const struct key *a, const struct key *b);
/* 64-bit keys ascending, then pairs: the order in which many are locked. */
int key_compare(const struct key *a, const struct key *b);
/* Printable ASCII, without quotes and asterisks: harmless in a message and in an SQL comment. */
void text_escape(const char *text, size_t length, char *buffer, size_t size);
/* "invoice 42" in quotes and escaped, 42 or (7, 42). */
void key_describe(const struct key *key, const char *name, size_t length, char *buffer,
                  size_t size);
void key_open(lua_State *L); /* pushes nothing; adds to the module at the top of the stack */

/* ---- module.c ------------------------------------------------------------------------- */

/* Raises Lua's own kind of argument error. The function's name and the position are those of
 * the caller outside pglocks' Lua files; `argument` counts without the connection. */
int argument_error(lua_State *L, int argument, const char *expected) __attribute__((noreturn));
/* "expected, got <type>" */
int type_error(lua_State *L, int argument, const char *expected, int index)
    __attribute__((noreturn));
/* A string without NUL, that strcmp sees whole. */
bool is_name(lua_State *L, int index);
/* "unknown option", for the key at -2 of a lua_next over the options. */
int option_error(lua_State *L, int argument) __attribute__((noreturn));
/* Where the user's code called us, as luaL_where says it; pushes a string. */
void push_caller(lua_State *L);
/* What every userdata of ours begins with, by its type. debug.setmetatable can give a file our
 * metatable, and one of ours another's: so it is this and the size that tell. */
enum magic {
  CONNECTION_MAGIC = 0x70676c63, /* "pglc" ... */
  CONNINFO_MAGIC = 0x70676c69,
  KEY_MAGIC = 0x70676c6b,
  LOCK_MAGIC = 0x70676c6c,
  RESULT_MAGIC = 0x70676c72,
  WAITER_MAGIC = 0x70676c77,
  WATCH_MAGIC = 0x70676c68
};

/* The userdata at `index` if it is one of ours, of that type; or NULL. */
void *test_userdata(lua_State *L, int index, size_t size, enum magic magic);
void *check_userdata(lua_State *L, int index, const char *type, size_t size, enum magic magic);
double monotonic_now(void); /* seconds */

enum code {
  NO_ERROR,
  ABORTED_TRANSACTION,
  BUSY_CONNECTION,
  CLOSED,
  CONNECT,
  DEADLOCK,
  FORKED,
  INTERRUPTED,
  LOST,
  NOT_HELD,
  PERMISSION,
  POOLED,
  SERVER,
  STANDBY,
  TIMEOUT,
  TOO_MANY_CONNECTIONS,
  TOO_MANY_LOCKS,
  UNKNOWN
};

#define SQLSTATE_SIZE 6
#define MESSAGE_SIZE 512

/* What went wrong, as plain C: it becomes a Lua error object when Lua may be called. */
struct failure {
  enum code code;
  char sqlstate[SQLSTATE_SIZE]; /* "": none */
  char message[MESSAGE_SIZE];
};

/* Seconds after which the server has given up a connection that we left: it hears nothing for 30,
 * and may grant a lock at the end of these, whose answer it then repeats for 30 more. */
#define FREED_BY 60

void failure_clear(struct failure *failure);
void failure_set(struct failure *failure, enum code code, const char *sqlstate,
                 const char *format, ...) __attribute__((format(printf, 4, 5)));
/* Somebody had dropped the prepared statement: the server did nothing. */
bool failure_never_ran(const struct failure *failure);
void raise_failure(lua_State *L, enum code code, const char *message);
void failure_push(lua_State *L, const struct failure *failure, const struct key *key);

/* ---- command.c ------------------------------------------------------------------------ */

/* NO_VALUE: there was no row. SOME: true for some of the keys, whose holdings are `found`; for all
 * it is TRUE, for none FALSE. OTHER: of no boolean, as pg_advisory_lock's void is none. */
enum value { NO_VALUE, VALUE_NULL, VALUE_FALSE, VALUE_SOME, VALUE_TRUE, VALUE_OTHER };

/* What the server said to a command. */
struct answer {
  bool failed;
  enum value value; /* of the first row's first column: booleans, NULL, or nothing of interest */
  struct failure failure; /* if it failed; last, because it is large and seldom needed */
};

struct holding;
struct session;

/* A holding can be in one chain of each kind. */
enum chained { ASKED, LEAVING, CHAINS };

/* What a command is about, in the order of its parameters: 64-bit keys come before pairs.
 *   ASKED     of the session's operation
 *   LEAVING   of a release, or of the guard after it, whose answer nobody waits for */
struct chain {
  enum chained kind;
  struct holding *first, *last;
  int count, pairs;
};

/* One command in flight, in the order sent. Who gets its answer: the session's operation, or,
 * where it was sent without waiting, the holdings whose release it is. */
struct command {
  struct command *next;
  struct chain leaving; /* empty: the answer is the operation's */
  bool settles;         /* the guard for doubtful holdings, not their release */
  bool looks;           /* whether they are held still */
  bool marks;           /* a 't' or an 'f' for each holding is to come */
  bool keep_result;
  bool prepares;  /* its statement, so that the first result is of that */
  bool abandoned; /* nobody wants its answer */
  bool vital;     /* the session is lost when it fails */
  bool announces; /* behind its own statement: whatever becomes of that, */
  bool settled;   /* its own has been answered by then */
  bool draws;     /* a token */
  bool commits;   /* abandoned: on_lost is told when it fails, of the lock on `key` */
  bool committed; /* the server said so */
  struct key key;
  int statement;  /* that it executes, or -1 */
  int results;    /* seen so far */
  struct answer answer;
};

enum guard { GUARD_LOOK, GUARD_UNLOCK };

/* The statements of lock.c, prepared when first used: for one key verb, shared, pair; for many
 * verb, shared. */
enum verb {
  VERB_LOCK,
  VERB_LOCK_TIMED,
  VERB_TRY,
  VERB_XACT_LOCK, /* of the transaction's scope: opens one, or joins the open one */
  VERB_XACT_TIMED,
  VERB_XACT_TRY, /* of many, in an open one: its savepoint is left to release, or to roll back to */
  VERB_UNLOCK,
  VERBS
};
enum { MANY = VERBS * 2 * 2, TRY_EACH = MANY + VERBS * 2, TOKEN = TRY_EACH + 2, STATEMENTS };

#define ROLL_BACK_TO_SAVED "ROLLBACK TO SAVEPOINT pglocks"
#define RELEASE_SAVED "RELEASE SAVEPOINT pglocks"

/* What any command may be about without command_reserve. */
enum { ALWAYS_ROOM_FOR = 32 };

/* Makes room for commands about so many keys, so that a release needs no memory, and so that the
 * network takes it at once: at the end of a scope nobody waits. False: no memory. */
bool command_reserve(struct session *s, size_t count);

/* Each sends one command. When that fails the session is lost, and the operation is done. */
void command_statement(struct session *s, enum verb verb, const struct chain *chain,
                       const char *milliseconds, const char *comment);
void command_guard(struct session *s, enum guard guard, const struct chain *chain);
void command_late(struct session *s); /* releases that have been put off, which any other command sends too */
void command_token(struct session *s);
/* What is to be announced: whoever waits for one of the markers hears of it. Nobody waits for the answer.
 * Commands that end a lock, outside a transaction or with it, announce that themselves: so nothing of it is
 * left to see when they are answered. */
void command_announce(struct session *s);
void command_listen(struct session *s, const struct key *marker);
void command_unlisten(struct session *s, const struct key *marker); /* NULL: of all */
void command_begin_transaction(struct session *s);
/* told: nobody waits, and on_lost hears of a failure, as of the lock on that key. */
void command_commit(struct session *s, const struct key *told);
void command_simple(struct session *s, const char *first, const char *second);
/* Ends the transaction, if one is open, lets everything go, and announces it; sends something in any
 * case. */
void command_unlock_all(struct session *s);
void command_query(struct session *s, const char *sql, int nparams, const char *const *values);
void command_sync(struct session *s);
/* A Sync that nobody waits for. */
void command_nothing(struct session *s);
/* Ends the transaction. Not awaited: what comes next finds it ended. */
void command_rollback(struct session *s, bool awaited);
/* Takes in what has arrived and hands out answers; never waits. False: the session is lost. */
bool commands_collect(struct session *s);
void commands_drop(struct session *s); /* the session is gone: nobody will answer */

/* ---- operation.c ---------------------------------------------------------------------- */

struct lock;

struct operation_kind {
  const char *name;
  bool interruptible; /* Ctrl-C and cancel() end its wait */
  /* Every command of it has been answered: send the next, or call operation_done. */
  void (*advance)(struct session *s);
  int (*finish)(lua_State *L, struct session *s); /* pushes what the call returns, or raises */
};

struct operation {
  const struct operation_kind *kind; /* NULL: the connection is free */
  int state;                         /* of its kind */
  bool done;
  bool interrupted; /* a cancel was asked for: whatever is got is let go */
  bool aside;       /* its wait was cancelled, to let go of what a release left; it goes on */
  bool heard;       /* input has arrived, of which some may be left in the socket */
  int unanswered;   /* commands in flight whose answer it waits for */
  double started, deadline; /* monotonic seconds; INFINITY: none */
  double reply_by;          /* a deadline of the step it is at, that needs no waiting */
  double look_at;           /* when to go on without input: to cancel again what is unanswered still, or to
                             * end a wait for a notification; INFINITY: not */
  PGresult **result;        /* of a query: in a box of Lua's */
  /* acquire, release and check */
  struct lock *lock;
  struct chain asked; /* the holdings that the server is asked about */
  struct key key;     /* for errors */
  bool has_key;
  int demand; /* of its kind */
  enum guard guard;
  int resume;     /* the state after the transaction was put right */
  int rounds;     /* of statements that a cancel hit */
  bool begins;    /* its statement began a transaction */
  bool each;      /* tries many keys, each for itself */
  uint64_t token; /* drawn for it */
  double timeout; /* seconds, < 0: none */
  const char *comment; /* SQL before the statement, kept alive by the environment; or NULL */
  struct failure failure; /* once done; NO_ERROR: success. From here on large, and seldom needed */
  struct answer answer;
};

/* For so many seconds; INFINITY: without a deadline. */
void operation_begin(struct session *s, const struct operation_kind *kind, double seconds);
/* Its outcome stands: NO_ERROR, or why it failed. */
void operation_done(struct session *s, enum code code, const char *sqlstate, const char *format,
                    ...) __attribute__((format(printf, 4, 5)));
void operation_interrupt(struct session *s);
/* Does what can be done without waiting. */
void operation_progress(struct session *s);
/* What it waits for. False: it is done. */
bool operation_wants(struct session *s, struct pollfd *wait);
/* When to look again, if nothing has arrived by then. */
double operation_wakes(const struct session *s);
/* Asks the server to cancel what it is at. The request may come before that has begun, and then be for
 * nothing: so it is repeated. */
bool operation_cancel(struct session *s);
/* Drives the steps until it is done, beginning now. Connection at 1. */
void operation_run(lua_State *L, struct session *s, double now);
/* Drives what has just been begun until it is done, then what its kind returns to Lua. */
int operation_complete(lua_State *L, struct session *s);
/* The operation is over: raises if it failed. Connection at 1. */
void operation_end(lua_State *L, struct session *s);
void operation_drop(struct session *s); /* is over, whatever became of it */
/* Nobody will drive it to its end: its outcome is unknown, and the connection is closed. */
void operation_abandon(struct session *s);

/* ---- session.c ------------------------------------------------------------------------ */

enum session_state { SESSION_CONNECTING, SESSION_OPEN, SESSION_LOST, SESSION_CLOSED };

/* What stands between us and the server's session. */
enum pooling { DIRECT, SESSION_POOLING, TRANSACTION_POOLING };

struct cancel;

enum { BUCKETS = 16 };

/* Bytes of so many keys as PostgreSQL's int8[] in binary form. */
#define PACKED_SIZE(keys) (20 + 12 * (size_t)(keys))

/* What every pair of lock and release looks at comes first, in a few lines of the processor's cache. */
struct session {
  PGconn *pg; /* NULL once closed, lost or forked */
  int refs;
  enum session_state state;
  unsigned born;  /* fork generation */
  bool doomed;    /* the server announced the end, and why stands in loss */
  bool closing;   /* close() has let go of all locks, and waits for the answer */
  bool loss_told; /* on_lost has been called */
  bool in_transaction, transaction_failed; /* after the last command that could change it */
  bool deferred;  /* releases are sent and their answers collected later */
  bool scheduled; /* a scheduler waits for it: nothing here blocks */
  enum pooling pooling;
  bool unflushed;        /* libpq has more to write than its socket took */
  bool broken;           /* not the server, but the network ended it */
  bool written;          /* there may be something to take at pump_fd */
  int wait_fd, timer_fd; /* of waits that block: an epoll instance on the socket and a timer, or -1 */
  double alarm;          /* when that strikes next, in monotonic seconds; 0: it does not */
  double reply_timeout;  /* seconds */
  struct command *oldest, **newest, *spare_commands;
  struct holding **buckets, *spare_holdings;
  size_t bucket_count, holding_count;
  unsigned long generations;
  int doubtful, settle_rounds;
  struct chain late; /* let go, and not sent yet; they count as releasing */
  int hasty;         /* releases since any of these were sent */
  struct cancel *cancel;    /* a cancel request under way */
  unsigned long operations; /* begun so far: the number of the one under way */
  uint64_t prepared;        /* a bit for each statement */
  unsigned long transaction, transactions; /* that a lock began: the number of the one that is open, or
                                            * 0; and how many there were */
  bool joined;              /* there are holdings of the transaction's scope */
  bool commit_failed;       /* and whether its transaction is open still has not been heard */
  bool rollback_due;        /* as soon as the operation under way is over */
  bool notified;            /* a notification has come since the last operation that waited for one */
  bool unlisten_due;        /* as soon as no transaction is open */
  int announced;            /* locks let go that are to be announced: their markers */
  struct key announcements[ALWAYS_ROOM_FOR];
  bool commits_deferred;    /* COMMIT is sent, and its answer collected later */
  double lease;             /* seconds, for a lock's transaction behind a pooler of transactions; 0: none */
  int pump_fd;              /* what libpq takes for the server is a socketpair: its other end, or -1.
                             * libpq does not know the server's address then, and cannot send it a
                             * cancel request */
  struct operation op;

  size_t packed_for; /* keys: room for so many as a parameter */
  char *packed, first_packed[PACKED_SIZE(ALWAYS_ROOM_FOR)];
  struct holding *first_buckets[BUCKETS];
  struct session *next, **link; /* all sessions of the process, for fork */
  struct failure loss;
  struct failure release_failure; /* of a release that nobody waited for, for on_lost */
  struct key release_key;
  int denied; /* holdings */
  bool telling; /* on_lost is called, and what it calls, or what is collected meanwhile, calls it for nothing */
  int backend_pid, server_version;
  int watch_fd; /* an epoll instance on the socket, or -1 */
  size_t given; /* bytes for libpq to read at pump_fd's other end */
};

struct session *session_new(void); /* NULL without memory */
void session_unref(struct session *s);
void session_disconnect(struct session *s);
/* Without an answer to wait for, and at any time: the last thing said on this session. */
void session_close(struct session *s);
/* The session is gone: with it all that it held, and the operation under way fails. */
void session_lose(struct session *s, enum code code, const char *sqlstate, const char *message);
bool session_has_input(const struct session *s);
bool session_alive(struct session *s); /* looks at the socket, no round trip */
unsigned session_forks(void);                     /* how many forks made this process */
bool session_is_foreign(const struct session *s); /* made by a parent process */
void session_note_transaction(struct session *s);
/* A file descriptor for the caller, readable while the socket is, and for good once that is closed;
 * it keeps nothing open, and its number is no other's when the socket's is. -1: none was to be had. */
int session_watch(struct session *s);
/* Makes sure that session_wait ends at `time`, or before. To arm a timer in each wait, and to disarm it
 * again, takes as long as all that we do ourselves: so one stays armed from wait to wait. False: that
 * cannot be. */
bool session_alarm(struct session *s, double now, double time);
/* Waits until input arrives that had not when it returned last, or for the alarm: 1, or 0; -1: a signal
 * came. */
int session_wait(struct session *s);
struct timespec timespec_of(double seconds);
void session_receive_notice(void *session, const PGresult *notice);
void sessions_open(void);
bool is_ready(int fd, short events); /* for poll's events, now */
/* Puts one end of a socketpair in the place of the socket that libpq has just opened. */
bool session_pump(struct session *s);

/* Nothing may be sent while s->cancel is not NULL; cancel_look sees whether it has finished. */
bool cancel_begin(struct session *s);
void cancel_look(struct session *s);
int cancel_fd(const struct session *s); /* readable when it has */

/* ---- connection.c --------------------------------------------------------------------- */

/* Slots of a connection's environment, all filled when it is made, so that storing into them
 * never allocates. */
enum slot {
  SLOT_CONNECTION = 1,
  SLOT_PENDING,   /* the lock that an acquire is for, unless it is on the stack; a query's box */
  SLOT_COMMENT,   /* keeps op.comment alive */
  SLOT_INTERRUPT, /* the error that Ctrl-C raised during a wait */
  SLOT_NOTHING,   /* a function that does nothing, for an interpreter's hook to interrupt */
  SLOT_TELL_LOSS, /* calls on_lost */
  SLOT_ON_LOST,
  SLOT_ON_FREE, /* called when a lock has been let go */
  SLOT_ON_END,  /* called when the scope of a lock ends that has joined another */
  SLOT_LOCK,    /* the metatable of locks */
  SLOTS = SLOT_LOCK
};

/* The environment of the connection at `index`; slot_set pops the value. */
void slot_set(lua_State *L, int index, enum slot slot);
void slot_get(lua_State *L, int index, enum slot slot);

struct session *connection_check(lua_State *L, int index); /* whatever its state */
struct session *connection_find(lua_State *L, int index);  /* NULL: it was collected, or is none */
/* Raises closed, lost, forked, busy_connection unless the connection may start an operation. */
void connection_ready(lua_State *L, int index, struct session *s);
/* on_lost, once for the loss, and for each release that went wrong. */
void connection_tell_loss(lua_State *L, int index, struct session *s);
bool session_is_untold(const struct session *s); /* is there anything of that? */
void connection_tell_free(lua_State *L, int index); /* on_free(conn), protected */
void connection_tell_end(lua_State *L, int index); /* of the lock behind it: on_end(conn, lock), protected */
/* Pushes the method whose name is at 2, of `scheduled` or of the methods; or nil, and false. */
bool method_push(lua_State *L, bool scheduled);
void connection_open(lua_State *L);

/* ---- transaction.c -------------------------------------------------------------------- */

#define ROLLED_BACK_MESSAGE "a statement had failed: the transaction was rolled back"

/* The transaction is over, or its end has been sent: with it go the locks of its scope. */
void transaction_ended(struct session *s);
/* A statement of the user's was answered with this tag: it may have ended the transaction and begun
 * another, or gone back to a savepoint. Then the server is asked which locks are left. */
void transaction_note_end(struct session *s, const char *tag);
/* None of those locks is left: not even that of a lock that began the transaction, which no savepoint is
 * before. So it has ended, and the one that is open is the user's. */
void transaction_replaced(struct session *s);
enum { COMMITTING = 1 }; /* op.demand */
/* The session must be free. key: of the lock whose release it is, not waited for where that is deferred
 * and nothing has failed so far; or NULL. */
void commit_begin(struct session *s, const struct key *key, double seconds);
/* Rolls the transaction back, and waits for the answer. */
void rollback_begin(struct session *s);
/* Without waiting, and as soon as it can be done. */
void rollback_now(struct session *s);
void transaction_open(lua_State *L); /* adds to the module at the top */

/* ---- notify.c ---------------------------------------------------------------------------
 *
 * Who waits with strategy = "notify" listens on a channel, and holds its marker, a shared lock. Who lets
 * go of a lock looks whether somebody has its marker, and only then notifies. Looking takes the server
 * about as long as a lock: so nobody looks whose lock was held shorter than a waiter's first pauses. */

#define ANNOUNCED_AFTER 0.001 /* seconds */

/* The marker of those who wait for a key, of which its channel has the number. False: no memory. */
bool marker_of(const struct key *key, struct key *marker);
/* A lock on the key was let go. */
void announce(struct session *s, const struct key *marker);
/* Sends what is to be announced, and what had to wait for a transaction's end, unless one is open. Nobody
 * waits. */
void notify_settle(struct session *s);
void notify_open(lua_State *L); /* adds to the module at the top */

/* ---- query.c -------------------------------------------------------------------------- */

/* The step of an operation that is one command of the user's. Where that has ended a transaction, what
 * could not be released inside it is let go, and that is waited for. */
void query_advance(struct session *s);
void push_exact(lua_State *L, int64_t n); /* as a decimal string where the runtime has it not exactly */
void query_open(lua_State *L); /* adds to the methods at the top, and to `start` below it */

/* ---- holding.c ------------------------------------------------------------------------ */

struct holding {
  struct key key;
  bool shared;
  bool transaction; /* of its scope: it ends with that, and is never unlocked */
  bool doubtful;  /* a release went wrong: the guard has yet to settle it */
  bool untouched; /* that release never ran, so that the guard must find the lock */
  bool denied;    /* the server did not hold it when it was released: for on_lost */
  bool asked;     /* in the operation's chain */
  bool found[CHAINS]; /* what the last command about the chain said */
  struct holding *after[CHAINS]; /* the next in the chain */
  int count;      /* locks of ours on it; the server never counts past 1 */
  int releasing;  /* releases and guards in flight that nobody waits for */
  /* Locks refer to it by number: nothing here points to a lock, because Lua 5.4 frees a userdata
   * whose finalizer it has no memory to call. */
  unsigned long generation; /* of one making, unless the server was found not to hold it */
  double since;             /* monotonic seconds */
  bool internal;            /* of one who waits, and nothing that a user has taken */
  enum { ANNOUNCES_ITSELF, ANNOUNCES_NOTHING, ANNOUNCES_OTHER } announces;
  struct key announced; /* marker of the other */
  bool has_name;            /* the first lock on it was taken by this name: */
  char *name;               /* a buffer that is kept for the next use of the struct */
  size_t name_length, name_size;
  struct holding *next; /* in its bucket, or among the spare ones */
};

#define CANCELLED_AT_MOST 50 /* times that a statement is repeated because a cancel hit it */
#define NO_ANSWER_MESSAGE "the server answered without a result; the connection was closed"
#define NOT_HELD_MESSAGE "the server did not hold the lock any more"

/* The holding of a key and mode, made where there is none; NULL without memory. */
struct holding *holding_get(struct session *s, const struct key *key, bool shared, bool transaction);
/* Is the key held in that scope, in any mode? */
bool holding_in_scope(struct session *s, const struct key *key, bool transaction);
/* Is a release of the key under way, in any mode of session scope? */
bool holding_leaves(struct session *s, const struct key *key);
/* For conn:locks(); name may be NULL. False: no memory. */
bool holding_set_name(struct holding *h, const char *name, size_t length);
/* The server does not know the lock: something in this session let it go behind our back. */
void holding_lost(struct session *s, struct holding *h);
/* The last lock on it has been let go: to be announced, where it was held long enough. */
void holding_left(struct session *s, struct holding *h, double now);
/* Forgets a holding that nothing is held, in flight, in doubt or to be told of. */
void holding_put(struct session *s, struct holding *h);
void chain_add(struct chain *chain, struct holding *h);
/* Empties the operation's chain, and forgets what is not needed for anything else. */
void holdings_unask(struct session *s);
void holding_doubt(struct session *s, struct holding *h);
void holding_trust(struct session *s, struct holding *h);
/* A deferred release, or the guard after it, was answered. */
void holdings_answered(struct session *s, const struct command *command);
/* The key of one that was denied, and is told of now. False: there is none. */
bool holdings_pop_denied(struct session *s, struct key *key);
bool holdings_any(const struct session *s); /* is anything held? */
/* Those of the transaction's scope, or all, are about to be let go: to be announced. */
void holdings_announce(struct session *s, bool all);
/* Those of the transaction's scope are no longer held. */
void holdings_leave_transaction(struct session *s);
/* Asks the server whether they are. */
void holdings_verify(struct session *s);
/* Sends the guard for every doubtful holding, unless the transaction must end first. */
void holdings_settle(struct session *s);
void holdings_free(struct session *s);

/* ---- names.c -------------------------------------------------------------------------- */

void names_open(lua_State *L);

/* ---- lock.c, and options.c and share.c, with a contract of their own in lock.h ---------- */

/* Seconds >= 0, clamped to what PostgreSQL can count; or raises. */
double timeout_check(lua_State *L, int index, int argument, const char *what);
/* What is held: { { key =, name =, mode =, scope =, count = }, ... }; empty if not `any`. */
void holdings_push(lua_State *L, const struct session *s, bool any);
/* A release went wrong that was sent before: an acquire that waits must not keep its lock. */
void acquire_step_aside(struct session *s);
void lock_open(lua_State *L);

#endif
