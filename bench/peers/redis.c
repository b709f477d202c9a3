/* A lock in Redis, as its users write it for one instance: SET with NX and a time to live, and a
 * script that deletes the key if it still has the owner's value. The argument is the path of the
 * server's Unix socket, in the place of a conninfo; the protocol is that of worker.lua.
 *
 * This lock is weaker than an advisory lock: it expires after 30 seconds, held or not, and when its
 * holder is late, two are inside at once. And who waits must ask again and again. */

#include <hiredis/hiredis.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char RELEASE[] = "if redis.call('GET', KEYS[1]) == ARGV[1] then "
                              "return redis.call('DEL', KEYS[1]) else return 0 end";

static redisContext *redis;
static char release_sha[41];

static void die(const char *message) {
  fprintf(stderr, "redis: %s\n", message);
  exit(1);
}

/* What a command has returned, which must be no error. */
static redisReply *checked(void *answer) {
  redisReply *reply = answer;
  if (reply == NULL) die(redis->errstr);
  if (reply->type == REDIS_REPLY_ERROR) die(reply->str);
  return reply;
}

/* Returns the process id of the server. */
static long connect_to(const char *path) {
  redisReply *reply;
  const char *field;
  long pid;

  redis = redisConnectUnix(path);
  if (redis == NULL) die("out of memory");
  if (redis->err) die(redis->errstr);

  reply = checked(redisCommand(redis, "SCRIPT LOAD %s", RELEASE));
  snprintf(release_sha, sizeof release_sha, "%s", reply->str);
  freeReplyObject(reply);

  reply = checked(redisCommand(redis, "INFO server"));
  field = strstr(reply->str, "process_id:");
  if (field == NULL) die("no process id");
  pid = strtol(field + strlen("process_id:"), NULL, 10);
  freeReplyObject(reply);
  return pid;
}

static const struct timespec PAUSE = {0, 50000000};

static void pair(void) {
  static unsigned long locks;
  char token[48]; /* of this lock alone */
  redisReply *reply;
  bool taken;

  snprintf(token, sizeof token, "%ld.%lu", (long)getpid(), ++locks);
  for (;;) {
    reply = checked(redisCommand(redis, "SET 4242 %s NX PX 30000", token));
    taken = reply->type == REDIS_REPLY_STATUS;
    freeReplyObject(reply);
    if (taken) break;
    nanosleep(&PAUSE, NULL);
  }

  reply = checked(redisCommand(redis, "EVALSHA %s 1 4242 %s", release_sha, token));
  if (reply->integer != 1) die("the lock has expired");
  freeReplyObject(reply);
}

static double seconds(clockid_t clock) {
  struct timespec time;
  clock_gettime(clock, &time);
  return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static long run(long milliseconds) {
  double finish = seconds(CLOCK_MONOTONIC) + (double)milliseconds / 1000;
  long done = 0;
  do {
    for (int i = 0; i < 10; i++) pair();
    done += 10;
  } while (seconds(CLOCK_MONOTONIC) < finish);
  return done;
}

static long count(long number) {
  for (long i = 0; i < number; i++) pair();
  return number;
}

int main(int argc, char **argv) {
  char line[64], command[8];

  if (argc < 2) {
    fprintf(stderr, "usage: redis PATH\n");
    return 2;
  }
  printf("ready %ld\n", connect_to(argv[1]));
  fflush(stdout);

  while (fgets(line, sizeof line, stdin) != NULL) {
    double began, cpu;
    long argument, done;
    if (sscanf(line, "%7s %ld", command, &argument) != 2) die("run MILLISECONDS or count N");
    began = seconds(CLOCK_MONOTONIC);
    cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
    done = strcmp(command, "run") == 0 ? run(argument) : count(argument);
    printf("%ld %.6f %.6f\n", done, seconds(CLOCK_MONOTONIC) - began,
           seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu);
    fflush(stdout);
  }
  redisFree(redis);
  return 0;
}
