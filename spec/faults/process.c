/* process.c: what the specs of faults do to their own process, and Lua has no words for. */
#define _GNU_SOURCE
#include <lauxlib.h>
#include <lua.h>
#include <signal.h>
#include <string.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile sig_atomic_t alarms;

static void count_alarm(int signal) {
  (void)signal;
  alarms++;
}

/* fork(): 0 in the child, its pid in the parent. */
static int process_fork(lua_State *L) {
  lua_pushinteger(L, fork());
  return 1;
}

/* wait(pid): its exit status, or minus the signal that ended it. */
static int process_wait(lua_State *L) {
  int status = 0;
  waitpid((pid_t)luaL_checkinteger(L, 1), &status, 0);
  lua_pushinteger(L, WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status));
  return 1;
}

/* exit(status): at once, without finalizers. */
static int process_exit(lua_State *L) {
  _exit((int)luaL_checkinteger(L, 1));
  return 0;
}

/* alarm(milliseconds): SIGALRM again and again, which every system call sees (no SA_RESTART);
 * 0: no more. Returns how many there have been. */
static int process_alarm(lua_State *L) {
  struct sigaction action;
  struct itimerval timer;
  memset(&action, 0, sizeof action);
  action.sa_handler = count_alarm;
  sigaction(SIGALRM, &action, NULL);
  memset(&timer, 0, sizeof timer);
  timer.it_value.tv_usec = timer.it_interval.tv_usec = (suseconds_t)luaL_checkinteger(L, 1) * 1000;
  setitimer(ITIMER_REAL, &timer, NULL);
  lua_pushinteger(L, alarms);
  return 1;
}

int luaopen_process(lua_State *L);

int luaopen_process(lua_State *L) {
  static const struct {
    const char *name;
    lua_CFunction function;
  } functions[] = {{"fork", process_fork}, {"wait", process_wait}, {"exit", process_exit},
                   {"alarm", process_alarm}};
  lua_newtable(L);
  for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
    lua_pushcfunction(L, functions[i].function);
    lua_setfield(L, -2, functions[i].name);
  }
  return 1;
}
