/* Preloaded: malloc, calloc and realloc fail when a program has armed them, in its own thread.
 * The program finds the functions below with dlsym. */
#define _GNU_SOURCE /* RTLD_NEXT */

#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

#define EXPORTED __attribute__((visibility("default")))
#define PER_THREAD static __thread __attribute__((tls_model("initial-exec")))

/* The next `before` calls succeed, the `failures` after them fail, the rest succeeds. */
EXPORTED void failing_malloc_arm(long before, long failures);
/* Returns how many calls failed. */
EXPORTED long failing_malloc_disarm(void);
/* While it is true, calls neither fail nor count. Returns what it was. */
EXPORTED bool failing_malloc_pause(bool pause);

PER_THREAD bool armed, paused;
PER_THREAD long before, failures, failed;

void failing_malloc_arm(long before_them, long how_many) {
  before = before_them;
  failures = how_many;
  failed = 0;
  armed = true;
}

long failing_malloc_disarm(void) {
  armed = false;
  return failed;
}

bool failing_malloc_pause(bool pause) {
  bool was = paused;
  paused = pause;
  return was;
}

static bool fails(void) {
  if (!armed || paused || before-- > 0 || failures-- <= 0) return false;
  failed++;
  errno = ENOMEM;
  return true;
}

/* What dlsym itself asks for while it looks is not to be had; it manages without. */
static void *next(const char *name) {
  PER_THREAD bool looking;
  void *function = NULL;
  if (looking) return NULL;
  looking = true;
  function = dlsym(RTLD_NEXT, name);
  looking = false;
  return function;
}

#define NEXT(type, name)                                                                         \
  static union {                                                                                 \
    void *address;                                                                               \
    type;                                                                                        \
  } real;                                                                                        \
  if (real.address == NULL && (real.address = next(name)) == NULL) return NULL

EXPORTED void *malloc(size_t size) {
  NEXT(void *(*call)(size_t), "malloc");
  return fails() ? NULL : real.call(size);
}

EXPORTED void *calloc(size_t count, size_t size) {
  NEXT(void *(*call)(size_t, size_t), "calloc");
  return fails() ? NULL : real.call(count, size);
}

EXPORTED void *realloc(void *old, size_t size) {
  NEXT(void *(*call)(void *, size_t), "realloc");
  return fails() ? NULL : real.call(old, size);
}
