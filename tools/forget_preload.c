/* Preloaded after a sanitizer: what the interpreter starts (psql, sh) must run without it. */
#include <stdlib.h>

__attribute__((constructor)) static void forget_preload(void) {
  unsetenv("LD_PRELOAD");
}
