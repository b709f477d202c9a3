/* harness.h: what the fuzz targets share: reading the input, a Lua state, what counts as a finding.
 *
 * A target runs in the project's folder, from whose lua/ it loads. */
#ifndef PGLOCKS_HARNESS_H
#define PGLOCKS_HARNESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../src/compat.h"

#define CANARY "c4n4ry" /* of every password: no error message may contain it */

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The input; past its end there are zeros. */
extern const uint8_t *input, *input_end;
unsigned input_byte(void);
uint64_t input_integer(int bytes);
bool input_left(void);

/* An invariant is broken: says so and aborts, which libFuzzer takes for a crash. */
void finding(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* Says what is done, when PGLOCKS_FUZZ_TRACE is set: for a reproducer. */
void trace(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Without anything that reaches out of the process: pglocks.core is this program's own. */
lua_State *harness_state(void);
/* The error at the top is one that pglocks raises: a string, or an error object with a known code,
 * which is returned. `argument`: a string must be an argument error. */
const char *harness_error(lua_State *L, const char *where, bool argument);

#endif
