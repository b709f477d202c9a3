/* libpq17.h: what the header of libpq 17 has more than an older one, for a module that is built with
 * the older header and runs with the newer library: `make test-libpq`. */
#include <libpq-fe.h>

#ifndef LIBPQ_HAS_ASYNC_CANCEL
#define LIBPQ_HAS_ASYNC_CANCEL 1
typedef struct pg_cancel_conn PGcancelConn;
PGcancelConn *PQcancelCreate(PGconn *conn);
int PQcancelStart(PGcancelConn *cancel);
PostgresPollingStatusType PQcancelPoll(PGcancelConn *cancel);
int PQcancelSocket(const PGcancelConn *cancel);
void PQcancelFinish(PGcancelConn *cancel);
#endif
