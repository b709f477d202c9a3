/* alloc.c: makes allocations fail, one after the other, and looks whether the locks stay true.
 *   alloc lua SCENARIO [STRIDE]      Lua's allocator refuses
 *   alloc malloc SCENARIO [STRIDE]   malloc does, for libpq and us; needs failing_malloc.so preloaded
 * Each run is a Lua state of its own that runs the SCENARIO. In run n every step of it meets an
 * n-th allocation that fails: that one alone, that and the next (Lua tries again after a
 * collection), or all from there to the end of the step. A step that got through without a
 * failure is over; when all are, so is the program. STRIDE leaves out numbers from the 12th on. */
#define _GNU_SOURCE /* RTLD_DEFAULT */

#include <dirent.h>
#include <dlfcn.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <libpq-fe.h>

#include "../../src/compat.h"

enum { MAX_STEPS = 64, LONGEST_STEP = 60 /* seconds */, ALL_UP_TO = 12, PATIENCE = 5000 /* ms */ };

static PGconn *observer;
static char conninfo[1024];
static int stride = 1;

static struct {
  long runs, failures, wrong, lost;
} count;

/* The next `before` allocations succeed, the `failures` after them fail, the rest succeeds. */
static struct {
  long before, failures;
} window;

static const char *passed[MAX_STEPS]; /* the steps that are over, in this window */
static int steps_passed;
static char where[160]; /* what is being done, for the watchdog */

static void fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

static void fail(const char *format, ...) {
  va_list args;
  va_start(args, format);
  vprintf(format, args);
  va_end(args);
  printf("\n");
  exit(2);
}

static void wrong(const char *what) {
  printf("WRONG in %s: %s\n", where, what);
  count.wrong++;
}

/* ---- failing --------------------------------------------------------------------------- */

static struct {
  bool armed;
  long before, failures, failed;
} lua;

/* Of failing_malloc.so; NULL: it is Lua's allocator that fails. */
static union {
  void *address;
  void (*call)(long before, long failures);
} malloc_arm;

static union {
  void *address;
  long (*call)(void);
} malloc_disarm;

static union {
  void *address;
  bool (*call)(bool);
} malloc_pause;

static bool lua_fails(void) {
  if (!lua.armed || lua.before-- > 0) return false;
  if (lua.failures-- <= 0) return false;
  lua.failed++;
  return true;
}

static void *allocate(void *data, void *old, size_t old_size, size_t size) {
  bool paused;
  (void)data;
  if (size == 0) {
    free(old);
    return NULL;
  }
  if (malloc_arm.address == NULL)
    return (old == NULL || size > old_size) && lua_fails() ? NULL : realloc(old, size);
  paused = malloc_pause.call(true);
  old = realloc(old, size);
  malloc_pause.call(paused);
  return old;
}

static void arm(void) {
  alarm(LONGEST_STEP);
  if (malloc_arm.address != NULL) {
    malloc_arm.call(window.before, window.failures);
    return;
  }
  lua.before = window.before;
  lua.failures = window.failures;
  lua.failed = 0;
  lua.armed = true;
}

/* Returns how many allocations failed. */
static long disarm(void) {
  long failed = malloc_arm.address != NULL ? malloc_disarm.call() : lua.failed;
  lua.armed = false;
  alarm(0);
  return failed;
}

static void watchdog(int signal) {
  static const char hangs[] = "HANGS: ";
  (void)signal;
  if (write(STDOUT_FILENO, hangs, sizeof hangs - 1) < 0 ||
      write(STDOUT_FILENO, where, strlen(where)) < 0 || write(STDOUT_FILENO, "\n", 1) < 0)
    _exit(3);
  _exit(2);
}

/* ---- what the scenario calls ----------------------------------------------------------- */

static bool is_passed(const char *step) {
  for (int i = 0; i < steps_passed; i++)
    if (strcmp(passed[i], step) == 0) return true;
  return false;
}

/* is_over(step) */
static int is_over(lua_State *L) {
  lua_pushboolean(L, is_passed(luaL_checkstring(L, 1)));
  return 1;
}

/* attempt(step, fn, ...): pcall(fn, ...), with allocations that fail. */
static int attempt(lua_State *L) {
  const char *step = luaL_checkstring(L, 1);
  int status;
  long failed;
  snprintf(where, sizeof where, "'%s', %ld from the %ldth on", step, window.failures,
           window.before + 1);
  arm();
  status = lua_pcall(L, lua_gettop(L) - 2, LUA_MULTRET, 0);
  failed = disarm();
  count.failures += failed;
  if (failed == 0) {
    if (steps_passed == MAX_STEPS) fail("too many steps");
    passed[steps_passed++] = strcpy(malloc(strlen(step) + 1), step);
  }
  lua_pushboolean(L, status == 0);
  lua_replace(L, 1);
  return lua_gettop(L);
}

static PGresult *look(const char *sql, const char *parameter) {
  PGresult *result = PQexecParams(observer, sql, 1, NULL, &parameter, NULL, NULL, 0);
  if (PQresultStatus(result) != PGRES_TUPLES_OK) fail("%s", PQerrorMessage(observer));
  return result;
}

/* look(sql, parameter): the first column, as another session sees it. */
static int look_for(lua_State *L) {
  const char *sql = luaL_checkstring(L, 1), *parameter = luaL_checkstring(L, 2);
  PGresult *result = look(sql, parameter);
  lua_newtable(L);
  for (int row = 0; row < PQntuples(result); row++) {
    lua_pushstring(L, PQgetvalue(result, row, 0));
    lua_rawseti(L, -2, row + 1);
  }
  PQclear(result);
  return 1;
}

static int report_wrong(lua_State *L) {
  wrong(luaL_checkstring(L, 1));
  return 0;
}

/* A session was given up. */
static int report_lost(lua_State *L) {
  (void)L;
  count.lost++;
  return 0;
}

static void pause_briefly(void) {
  struct timespec time = {0, 1000000};
  nanosleep(&time, NULL);
}

static int pause_lua(lua_State *L) {
  (void)L;
  pause_briefly();
  return 0;
}

static const luaL_Reg functions[] = {{"attempt", attempt},   {"is_over", is_over},
                                     {"look", look_for},     {"lost", report_lost},
                                     {"pause", pause_lua},   {"wrong", report_wrong},
                                     {NULL, NULL}};

/* ---- runs ------------------------------------------------------------------------------ */

static int open_files(void) {
  DIR *folder = opendir("/proc/self/fd");
  int n = 0;
  if (folder == NULL) fail("no /proc/self/fd");
  while (readdir(folder) != NULL) n++;
  closedir(folder);
  return n;
}

static int sessions(void) {
  char name[32];
  PGresult *result;
  int n;
  snprintf(name, sizeof name, "alloc %ld", (long)getpid());
  result = look("SELECT 1 FROM pg_stat_activity WHERE application_name = $1", name);
  n = PQntuples(result);
  PQclear(result);
  return n;
}

static void run(const char *scenario) {
  int files = open_files();
  lua_State *L = lua_newstate(allocate, NULL);
  if (L == NULL) fail("no Lua state");
  luaL_openlibs(L);
  if (luaL_loadfile(L, scenario) != 0) fail("%s", lua_tostring(L, -1));
  lua_newtable(L);
  luaL_setfuncs(L, functions, 0);
  lua_pushstring(L, conninfo);
  lua_pushboolean(L, malloc_arm.address != NULL);
  if (lua_pcall(L, 3, 0, 0) != 0) {
    lua_getglobal(L, "tostring");
    lua_insert(L, -2);
    lua_call(L, 1, 1);
    fail("after %s: %s", where, lua_tostring(L, -1));
  }
  lua_close(L);
  /* A cancel request in a thread, and the server, may take a moment. */
  for (int i = 0; i < PATIENCE && (open_files() != files || sessions() > 0); i++) pause_briefly();
  if (open_files() != files) wrong("a file is left open");
  if (sessions() > 0) wrong("a session is left behind");
  count.runs++;
}

static void run_all(const char *scenario, long failures) {
  long before;
  window.failures = failures;
  for (long n = 1;; n += n < ALL_UP_TO ? 1 : stride) {
    window.before = n - 1;
    before = count.failures;
    run(scenario);
    if (count.failures == before) break;
  }
  while (steps_passed > 0) {
    steps_passed--;
    free((void *)(size_t)passed[steps_passed]);
  }
}

int main(int argc, char **argv) {
  union {
    void *address;
    void (*call)(void);
  } check_leaks;
  const char *server = getenv("PGLOCKS_TEST_CONNINFO");
  static const long windows[] = {1, 2, LONG_MAX / 2};
  if (argc < 3 || server == NULL) fail("usage: alloc lua|malloc SCENARIO [STRIDE]");
  if (argc > 3) stride = atoi(argv[3]);
  if (strcmp(argv[1], "malloc") == 0) {
    malloc_arm.address = dlsym(RTLD_DEFAULT, "failing_malloc_arm");
    malloc_disarm.address = dlsym(RTLD_DEFAULT, "failing_malloc_disarm");
    malloc_pause.address = dlsym(RTLD_DEFAULT, "failing_malloc_pause");
    if (malloc_arm.address == NULL) fail("failing_malloc.so is not preloaded");
  }
  snprintf(conninfo, sizeof conninfo, "%s application_name='alloc %ld'", server, (long)getpid());
  setvbuf(stdout, NULL, _IOLBF, BUFSIZ);
  signal(SIGALRM, watchdog);
  observer = PQconnectdb(server);
  PQclear(look("SELECT pg_advisory_lock(1, $1::int)", "2")); /* for those that find it taken */
  for (size_t i = 0; i < sizeof windows / sizeof *windows; i++) run_all(argv[2], windows[i]);
  PQfinish(observer);
  printf("%ld allocations failed in %ld runs, %ld sessions were given up, %ld wrong\n",
         count.failures, count.runs, count.lost, count.wrong);
  /* Not by way of exit: under a preloaded libasan, libp11-kit's destructor waits for ever there.
   * So the search for leaks has to be asked for. */
  check_leaks.address = dlsym(RTLD_DEFAULT, "__lsan_do_leak_check");
  if (check_leaks.address != NULL) check_leaks.call();
  _exit(count.wrong > 0);
}
