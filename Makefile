# GNU make. `make help` says what there is to do.

LUA    ?= lua5.4
LUAJIT ?= luajit
CFLAGS ?= -O2 -g
export LUA LUAJIT

# The folder of a header: pkg-config's answer, or the first of the usual places.
incdir = $(or $(patsubst -I%,%,$(firstword $(shell pkg-config --cflags-only-I $(1) 2>/dev/null))),$(2))
LUA_INCDIR    ?= $(call incdir,lua5.4,/usr/include/lua5.4)
LUAJIT_INCDIR ?= $(call incdir,luajit,/usr/include/luajit-2.1)
PQ_INCDIR     ?= $(call incdir,libpq,$(shell pg_config --includedir 2>/dev/null))
# The runtimes as libraries, for the program of spec/alloc.
LUA_LIBS      ?= $(or $(shell pkg-config --libs lua5.4 2>/dev/null),-llua5.4)
LUAJIT_LIBS   ?= $(or $(shell pkg-config --libs luajit 2>/dev/null),-lluajit-5.1)

STANDARD := -std=c99 -fPIC -fvisibility=hidden
WARNINGS := -Wall -Wextra -pedantic -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wcast-qual \
            -Wwrite-strings -Wpointer-arith -Wformat=2 -Wvla -Werror
LIBS     := -lpq -lcrypto -lz -lpthread
SANITIZE := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined

comma := ,
SOURCES := $(wildcard src/*.c)
ROCKSPEC := pglocks-scm-1.rockspec

# Both runtimes, or the one whose headers are there.
runtimes := $(if $(wildcard $(LUA_INCDIR)/lua.h),5.4) $(if $(wildcard $(LUAJIT_INCDIR)/lua.h),jit)
runtimes := $(or $(strip $(runtimes)),5.4)

.PHONY: all demo test test-servers test-libpq long contended stress fuzz lint sanitizers sanitize \
        valgrind rock bench bench-plot bench-nginx bench-loops clean help
all: $(runtimes:%=build/%/pglocks/core.so) $(runtimes:%=build/%/alloc) $(runtimes:%=build/%/process.so) \
     build/failing_malloc.so build/jumping_clock.so

# $(1): folder in build/, $(2): the folder of lua.h, $(3): flags. Each has objects of its own,
# as one made for Lua 5.4 must never end up in LuaJIT.
define variant
build/$(1)/pglocks/core.so: $$(SOURCES:src/%.c=build/$(1)/%.o)
	@mkdir -p $$(@D)
	$$(CC) -shared $(3) $$(LDFLAGS) -o $$@ $$^ $$(LIBS)

build/$(1)/%.o: src/%.c Makefile
	@mkdir -p $$(@D)
	$$(CC) $$(STANDARD) $$(WARNINGS) $(3) -MMD -MP -I$(2) -I$$(PQ_INCDIR) -c -o $$@ $$<

-include $$(wildcard build/$(1)/*.d)
endef
$(eval $(call variant,5.4,$(LUA_INCDIR),$(CFLAGS)))
$(eval $(call variant,jit,$(LUAJIT_INCDIR),$(CFLAGS)))
# The module stays loaded to the end, so that a leak can be told by its function's name.
$(eval $(call variant,asan-5.4,$(LUA_INCDIR),$(SANITIZE) -Wl$(comma)-z$(comma)nodelete))
$(eval $(call variant,asan-jit,$(LUAJIT_INCDIR),$(SANITIZE) -Wl$(comma)-z$(comma)nodelete))

# With the newest libpq that tools/fetch-postgres knows, which has a cancel request of its own kind.
NEWEST_LIBPQ = $(lastword $(sort $(wildcard build/postgres/18*/native/lib)))
newest_libpq = $(CFLAGS) -D_GNU_SOURCE -include spec/faults/libpq17.h -L$(NEWEST_LIBPQ) -Wl$(comma)-rpath$(comma)$(CURDIR)/$(NEWEST_LIBPQ)
$(eval $(call variant,libpq-5.4,$(LUA_INCDIR),$(newest_libpq)))
$(eval $(call variant,libpq-jit,$(LUAJIT_INCDIR),$(newest_libpq)))

# The spec of failing allocations: a program that holds the interpreter itself.
define alloc
build/$(1)/alloc: spec/alloc/alloc.c src/compat.h Makefile
	@mkdir -p $$(@D)
	$$(CC) $$(STANDARD) $$(WARNINGS) $$(CFLAGS) -I$(2) -I$$(PQ_INCDIR) $$(LDFLAGS) -o $$@ $$< $(3) -lpq -ldl
endef
$(eval $(call alloc,5.4,$(LUA_INCDIR),$(LUA_LIBS)))
$(eval $(call alloc,jit,$(LUAJIT_INCDIR),$(LUAJIT_LIBS)))

build/failing_malloc.so: spec/alloc/failing_malloc.c Makefile
	@mkdir -p $(@D)
	$(CC) $(STANDARD) $(WARNINGS) $(CFLAGS) -fno-builtin -shared $(LDFLAGS) -o $@ $< -ldl

# For the specs of faults: a module for both runtimes, and a library to preload.
build/5.4/process.so build/asan-5.4/process.so: HEADERS = $(LUA_INCDIR)
build/jit/process.so build/asan-jit/process.so: HEADERS = $(LUAJIT_INCDIR)
build/%/process.so: spec/faults/process.c Makefile
	@mkdir -p $(@D)
	$(CC) -std=c99 -fPIC $(WARNINGS) $(CFLAGS) -I$(HEADERS) -shared $(LDFLAGS) -o $@ $<

build/jumping_clock.so: spec/faults/jumping_clock.c Makefile
	@mkdir -p $(@D)
	$(CC) -std=c99 -fPIC $(WARNINGS) $(CFLAGS) -shared $(LDFLAGS) -o $@ $<

# What tools/install-deps installs is seen by a make that starts after it.
demo:
	@tools/install-deps demo
	@$(MAKE) -s --no-print-directory build/5.4/pglocks/core.so
	@tools/with-postgres tools/lua 5.4 demo/demo.lua

# make test SPEC=spec/key_spec.lua TEST_ARGS=--filter=pair RUNTIMES=jit
test:
	@tools/install-deps test
	@$(MAKE) -s --no-print-directory all
	@tools/with-postgres tools/run-specs $(SPEC) $(TEST_ARGS)

# On other servers than the one that is installed: make test-servers SERVERS="13 18" SPEC=...
SERVERS ?= 13 15 17 18
test-servers:
	@tools/install-deps test
	@$(MAKE) -s --no-print-directory all
	@tools/test-servers $(SERVERS) -- $(SPEC) $(TEST_ARGS)

LIBPQ_SPECS := $(addprefix spec/,interrupt_spec.lua guard_spec.lua connection_spec.lua steps_spec.lua \
                 faults/session_spec.lua faults/stress_spec.lua)
test-libpq:
	@tools/install-deps test
	@tools/fetch-postgres 18 >/dev/null
	@$(MAKE) -s --no-print-directory all $(runtimes:%=build/libpq-%/pglocks/core.so)
	@PGLOCKS_BUILD=libpq- PGLOCKS_TEST_BINDIR=$$(tools/fetch-postgres 18) \
	tools/with-postgres tools/run-specs $(or $(SPEC),$(LIBPQ_SPECS)) $(TEST_ARGS)

# Every allocation of Lua fails once, 500 coroutines wait, processes contend for longer.
long:
	@$(MAKE) -s --no-print-directory test PGLOCKS_TEST_SIZE=5

# For long runs by hand: the races that one run of the specs may miss.
contended: ROUNDS ?= 200
contended:
	@tools/install-deps test
	@$(MAKE) -s --no-print-directory all
	@tools/with-postgres tools/contended $(ROUNDS)

# Processes that contend while others strike them and the server, and hand over fencing tokens across
# crashes: the long form of their specs.
stress: ROUNDS ?= 10000
stress:
	@$(MAKE) -s --no-print-directory test SPEC=spec/faults/stress_spec.lua PGLOCKS_STRESS_ROUNDS=$(ROUNDS)
	@$(MAKE) -s --no-print-directory test SPEC=spec/faults/token_spec.lua PGLOCKS_STRESS_ROUNDS=$(ROUNDS)

sanitizers: build/forget_preload.so $(runtimes:%=build/%/alloc) $(runtimes:%=build/asan-%/pglocks/core.so) \
            $(runtimes:%=build/asan-%/process.so)

sanitize:
	@tools/install-deps test
	@$(MAKE) -s --no-print-directory sanitizers
	@PGLOCKS_BUILD=asan- PGLOCKS_TEST_SLOW=4 \
	LSAN_OPTIONS=print_suppressions=0$(addprefix :suppressions=$(CURDIR)/,$(wildcard tools/lsan.supp)) \
	PGLOCKS_UNDER="env LD_PRELOAD=$$($(CC) -print-file-name=libasan.so):$(CURDIR)/build/forget_preload.so" \
	tools/with-postgres tools/run-specs $(SPEC) $(TEST_ARGS)

build/forget_preload.so: tools/forget_preload.c
	@mkdir -p $(@D)
	$(CC) -D_GNU_SOURCE $(STANDARD) -shared -o $@ $<

valgrind:
	@tools/install-deps ci
	@$(MAKE) -s --no-print-directory all
	@PGLOCKS_TEST_SLOW=10 \
	PGLOCKS_UNDER="valgrind -q --error-exitcode=99 --leak-check=full --show-leak-kinds=definite \
	  --errors-for-leak-kinds=definite --keep-debuginfo=yes \
	  $(addprefix --suppressions=$(CURDIR)/,$(wildcard tools/valgrind.supp))" \
	tools/with-postgres tools/run-specs $(SPEC) $(TEST_ARGS)

# The targets of fuzz/, each for FUZZ_SECONDS. With libFuzzer, which is clang's.
FUZZ_CC ?= clang
export FUZZ_SECONDS ?= 60
export FUZZ_SEED ?= 0
FUZZ := -O1 -g -fno-omit-frame-pointer -fsanitize=fuzzer,address,undefined \
        -fno-sanitize-recover=undefined

fuzz:
	@tools/install-deps ci
	@$(MAKE) -s --no-print-directory build/fuzz/keys build/fuzz/server
	@fuzz/run keys server

# What a target defines as __wrap_x is called for x, by our sources alone.
build/fuzz/%: fuzz/%.c fuzz/harness.c fuzz/harness.h $(SOURCES) $(wildcard src/*.h) Makefile
	@mkdir -p $(@D)
	$(FUZZ_CC) -D_GNU_SOURCE $(STANDARD) $(WARNINGS) $(FUZZ) -I$(LUA_INCDIR) -I$(PQ_INCDIR) \
	  $(LDFLAGS) $$(grep -oh '__wrap_[A-Za-z_]*' $< | sort -u | sed 's/__wrap_/-Wl,--wrap=/') \
	  -o $@ $(filter %.c,$^) $(LUA_LIBS) $(LIBS) -lm

lint:
	@tools/lint -std=c99 -I$(LUA_INCDIR) -I$(PQ_INCDIR)
	luarocks lint $(ROCKSPEC)

rock:
	@tools/install-deps test
	luarocks lint $(ROCKSPEC)
	@tools/try-rock 5.4 $(LUA) PQ_INCDIR=$(PQ_INCDIR)
	@tools/try-rock jit $(LUAJIT) PQ_INCDIR=$(PQ_INCDIR) LUA_INCDIR=$(LUAJIT_INCDIR)

# SHORT=1 for a glance, ONLY=part for one part. The worker of redis needs hiredis, which may be missing.
bench:
	@tools/install-deps bench
	@$(MAKE) -s --no-print-directory $(runtimes:%=build/%/pglocks/core.so) build/bench/c build/bench/delay
	@$(MAKE) -s --no-print-directory build/bench/redis 2>/dev/null || rm -f build/bench/redis
	@tools/with-postgres tools/lua 5.4 bench/run.lua

build/bench/c: LIBRARIES = -lpq
build/bench/redis: LIBRARIES = -lhiredis
build/bench/%: bench/%.c Makefile
	@mkdir -p $(@D)
	$(CC) -D_GNU_SOURCE $(STANDARD) $(WARNINGS) $(CFLAGS) -I$(PQ_INCDIR) $(LDFLAGS) -o $@ $< $(LIBRARIES)

build/bench/%: bench/peers/%.c Makefile
	@mkdir -p $(@D)
	$(CC) -D_GNU_SOURCE $(STANDARD) $(WARNINGS) $(CFLAGS) $(LDFLAGS) -o $@ $< $(LIBRARIES)

bench-plot: # of what `make bench` has left
	@gnuplot bench/plot.gp

# SHORT=1 for a glance; see bench/nginx/run.lua for more.
bench-nginx:
	@tools/install-deps test
	@$(MAKE) -s --no-print-directory build/5.4/pglocks/core.so build/jit/pglocks/core.so \
	  build/bench/load build/bench/delay
	@tools/with-postgres tools/lua 5.4 bench/nginx/run.lua

bench-loops:
	@tools/install-deps test
	@$(MAKE) -s --no-print-directory $(runtimes:%=build/%/pglocks/core.so)
	@tools/with-postgres sh -ec 'for runtime in $(or $(RUNTIMES),$(runtimes)); do tools/lua $$runtime bench/loops.lua; done'

build/bench/%: bench/nginx/%.c Makefile
	@mkdir -p $(@D)
	$(CC) -D_GNU_SOURCE $(STANDARD) $(WARNINGS) $(CFLAGS) $(LDFLAGS) -o $@ $<

clean:
	rm -rf build

help:
	@echo "make            build for Lua 5.4 and LuaJIT, into build/"
	@echo "make demo       see it work, on a PostgreSQL of its own"
	@echo "make test       run the specs under both; SPEC=file TEST_ARGS=--filter=name RUNTIMES=5.4|jit"
	@echo "make test-servers  run them on several versions of PostgreSQL; SERVERS=\"13 15 17 18\" SPEC=..."
	@echo "make test-libpq  run those of cancelling and connecting with libpq 18; SPEC=... RUNTIMES=5.4|jit"
	@echo "make long       the same, with more rounds in those that could always do more"
	@echo "make contended  repeat the specs of contention until one fails; ROUNDS=200 RUNTIMES=5.4|jit"
	@echo "make stress     prove mutual exclusion and fencing tokens, long; ROUNDS=10000 RUNTIMES=5.4|jit"
	@echo "make lint       check style and suspicious code"
	@echo "make sanitize   run the specs with AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make valgrind   run the specs under valgrind"
	@echo "make fuzz       feed arbitrary arguments, and a server that lies; FUZZ_SECONDS=60 FUZZ_SEED=0"
	@echo "make rock       build and load the rock, for both"
	@echo "make bench      compare with C by hand and with other libraries; SHORT=1 ONLY=part"
	@echo "make bench-plot  draw what make bench has measured, into build/bench/"
	@echo "make bench-nginx  compare with a plain cosocket inside nginx; SHORT=1 ONLY=part"
	@echo "make bench-loops  compare event loops with blocking, and wait in many coroutines; SHORT=1 RUNTIMES=5.4|jit"
	@echo "make clean      remove build/"
