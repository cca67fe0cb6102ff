/* The rules of src/spvtpm/processor/migration/handoff.py, written by `python -m models --write`: change them there. */

#define OFFERING 1
#define STOPPED 2
#define GONE 3
#define FORGOTTEN 4
#define ABORTED 5
#define EXPECTING 6
#define PREPARED 7
#define LIVE 8
#define EMPTY 9

#define SOURCE_BEGINS(K) \
    :: atomic { failures > 0 && !calm && rule[me] == 0 && IS_SOURCE(K) && source[K] == OFFERING && COMES_SOURCE_STOP(K) && true -> handoff[me] = K; printf("begins %d %d SOURCE OFFERING STOP\n", me, K); FAILS(handoff[me]); ENDS } \
    :: atomic { rule[me] == 0 && IS_SOURCE(K) && source[K] == OFFERING && COMES_SOURCE_STOP(K) && true -> handoff[me] = K; printf("begins %d %d SOURCE OFFERING STOP\n", me, K); SOURCE_DOES_STOP_VTPM(handoff[me]); printf("does %d STOP_VTPM\n", me); SOURCE_BECOMES(handoff[me], STOPPED); printf("becomes %d STOPPED\n", me); SOURCE_DOES_SEND_STATE(handoff[me]); printf("does %d SEND_STATE\n", me); ENDS } \
    :: atomic { rule[me] == 0 && IS_SOURCE(K) && source[K] == OFFERING && COMES_SOURCE_CANCEL(K) && true -> handoff[me] = K; printf("begins %d %d SOURCE OFFERING CANCEL\n", me, K); SOURCE_BECOMES(handoff[me], ABORTED); printf("becomes %d ABORTED\n", me); SOURCE_DOES_TELL_ABORT(handoff[me]); printf("does %d TELL_ABORT\n", me); ENDS } \
    :: atomic { rule[me] == 0 && IS_SOURCE(K) && source[K] == OFFERING && COMES_SOURCE_LINK_LOST(K) && true -> handoff[me] = K; USES_SOURCE_LINK_LOST(K); printf("begins %d %d SOURCE OFFERING LINK_LOST\n", me, K); SOURCE_BECOMES(handoff[me], ABORTED); printf("becomes %d ABORTED\n", me); ENDS } \
    :: atomic { failures > 0 && !calm && rule[me] == 0 && IS_SOURCE(K) && source[K] == STOPPED && COMES_SOURCE_PREPARED(K) && true -> handoff[me] = K; USES_SOURCE_PREPARED(K); printf("begins %d %d SOURCE STOPPED PREPARED\n", me, K); SOURCE_FAILS_TO_STORE(handoff[me], GONE); ENDS } \
    :: atomic { rule[me] == 0 && IS_SOURCE(K) && source[K] == STOPPED && COMES_SOURCE_PREPARED(K) && true -> handoff[me] = K; USES_SOURCE_PREPARED(K); printf("begins %d %d SOURCE STOPPED PREPARED\n", me, K); SOURCE_STORES(handoff[me], GONE); printf("stores %d GONE\n", me); rule[me] = 5; step[me] = 1 } \
    :: atomic { rule[me] == 0 && IS_SOURCE(K) && source[K] == STOPPED && COMES_SOURCE_CANCEL(K) && true -> handoff[me] = K; printf("begins %d %d SOURCE STOPPED CANCEL\n", me, K); SOURCE_BECOMES(handoff[me], ABORTED); printf("becomes %d ABORTED\n", me); SOURCE_DOES_RUN_VTPM(handoff[me]); printf("does %d RUN_VTPM\n", me); SOURCE_DOES_TELL_ABORT(handoff[me]); printf("does %d TELL_ABORT\n", me); ENDS } \
    :: atomic { rule[me] == 0 && IS_SOURCE(K) && source[K] == STOPPED && COMES_SOURCE_LINK_LOST(K) && true -> handoff[me] = K; USES_SOURCE_LINK_LOST(K); printf("begins %d %d SOURCE STOPPED LINK_LOST\n", me, K); SOURCE_BECOMES(handoff[me], ABORTED); printf("becomes %d ABORTED\n", me); SOURCE_DOES_RUN_VTPM(handoff[me]); printf("does %d RUN_VTPM\n", me); ENDS } \
    :: atomic { rule[me] == 0 && IS_SOURCE(K) && source[K] == GONE && COMES_SOURCE_ASK_COMMIT(K) && (!calm || !commit_carried[K]) -> handoff[me] = K; printf("begins %d %d SOURCE GONE ASK_COMMIT\n", me, K); SOURCE_BECOMES(handoff[me], GONE); printf("becomes %d GONE\n", me); SOURCE_DOES_TELL_COMMIT(handoff[me]); printf("does %d TELL_COMMIT\n", me); ENDS } \
    :: atomic { failures > 0 && !calm && rule[me] == 0 && IS_SOURCE(K) && source[K] == GONE && COMES_SOURCE_RECEIPT(K) && true -> handoff[me] = K; printf("begins %d %d SOURCE GONE RECEIPT\n", me, K); SOURCE_FAILS_TO_STORE(handoff[me], FORGOTTEN); ENDS } \
    :: atomic { rule[me] == 0 && IS_SOURCE(K) && source[K] == GONE && COMES_SOURCE_RECEIPT(K) && true -> handoff[me] = K; printf("begins %d %d SOURCE GONE RECEIPT\n", me, K); SOURCE_STORES(handoff[me], FORGOTTEN); printf("stores %d FORGOTTEN\n", me); ENDS } \
    :: atomic { rule[me] == 0 && IS_SOURCE(K) && source[K] == GONE && COMES_SOURCE_LINK_LOST(K) && true -> handoff[me] = K; USES_SOURCE_LINK_LOST(K); printf("begins %d %d SOURCE GONE LINK_LOST\n", me, K); SOURCE_BECOMES(handoff[me], GONE); printf("becomes %d GONE\n", me); ENDS } \
    :: atomic { rule[me] == 0 && IS_SOURCE(K) && source[K] == ABORTED && COMES_SOURCE_ASK_ABORT(K) && (!calm || !abort_carried[K]) -> handoff[me] = K; printf("begins %d %d SOURCE ABORTED ASK_ABORT\n", me, K); SOURCE_BECOMES(handoff[me], ABORTED); printf("becomes %d ABORTED\n", me); SOURCE_DOES_TELL_ABORT(handoff[me]); printf("does %d TELL_ABORT\n", me); ENDS } \
    :: atomic { rule[me] == 0 && IS_SOURCE(K) && source[K] == ABORTED && COMES_SOURCE_LINK_LOST(K) && true -> handoff[me] = K; USES_SOURCE_LINK_LOST(K); printf("begins %d %d SOURCE ABORTED LINK_LOST\n", me, K); SOURCE_BECOMES(handoff[me], ABORTED); printf("becomes %d ABORTED\n", me); ENDS } \
    :: atomic { rule[me] == 0 && IS_SOURCE(K) && source[K] == FORGOTTEN && COMES_SOURCE_RECEIPT(K) && (!calm) -> handoff[me] = K; printf("begins %d %d SOURCE FORGOTTEN RECEIPT\n", me, K); SOURCE_BECOMES(handoff[me], FORGOTTEN); printf("becomes %d FORGOTTEN\n", me); ENDS } \
    :: atomic { rule[me] == 0 && IS_SOURCE(K) && source[K] == FORGOTTEN && COMES_SOURCE_LINK_LOST(K) && true -> handoff[me] = K; USES_SOURCE_LINK_LOST(K); printf("begins %d %d SOURCE FORGOTTEN LINK_LOST\n", me, K); SOURCE_BECOMES(handoff[me], FORGOTTEN); printf("becomes %d FORGOTTEN\n", me); ENDS }

#define SOURCE_GOES_ON \
    :: atomic { rule[me] == 5 && step[me] == 1 -> SOURCE_DOES_TELL_COMMIT(handoff[me]); printf("does %d TELL_COMMIT\n", me); rule[me] = 5; step[me] = 2 } \
    :: atomic { rule[me] == 5 && step[me] == 2 -> SOURCE_DOES_DROP_VTPM(handoff[me]); printf("does %d DROP_VTPM\n", me); ENDS }

#define SOURCE_FORGETS_TO ABORTED
#define SOURCE_AFTER_CRASH(state) \
    ((state) == FORGOTTEN -> FORGOTTEN : ((state) == ABORTED -> ABORTED : ((state) == GONE -> GONE : ((state) == STOPPED -> ABORTED : ((state) == OFFERING -> ABORTED : ABORTED)))))

#define DESTINATION_BEGINS(K) \
    :: atomic { failures > 0 && !calm && rule[me] == 0 && IS_DESTINATION(K) && destination[K] == EXPECTING && COMES_DESTINATION_STATE(K) && true -> handoff[me] = K; USES_DESTINATION_STATE(K); printf("begins %d %d DESTINATION EXPECTING STATE\n", me, K); FAILS(handoff[me]); ENDS } \
    :: atomic { failures > 0 && !calm && rule[me] == 0 && IS_DESTINATION(K) && destination[K] == EXPECTING && COMES_DESTINATION_STATE(K) && true -> handoff[me] = K; USES_DESTINATION_STATE(K); printf("begins %d %d DESTINATION EXPECTING STATE\n", me, K); DESTINATION_DOES_LOAD_VTPM(handoff[me]); printf("does %d LOAD_VTPM\n", me); DESTINATION_FAILS_TO_STORE(handoff[me], PREPARED); ENDS } \
    :: atomic { rule[me] == 0 && IS_DESTINATION(K) && destination[K] == EXPECTING && COMES_DESTINATION_STATE(K) && true -> handoff[me] = K; USES_DESTINATION_STATE(K); printf("begins %d %d DESTINATION EXPECTING STATE\n", me, K); DESTINATION_DOES_LOAD_VTPM(handoff[me]); printf("does %d LOAD_VTPM\n", me); DESTINATION_STORES(handoff[me], PREPARED); printf("stores %d PREPARED\n", me); rule[me] = 19; step[me] = 1 } \
    :: atomic { rule[me] == 0 && IS_DESTINATION(K) && destination[K] == EXPECTING && COMES_DESTINATION_CANCEL(K) && true -> handoff[me] = K; printf("begins %d %d DESTINATION EXPECTING CANCEL\n", me, K); DESTINATION_BECOMES(handoff[me], EMPTY); printf("becomes %d EMPTY\n", me); DESTINATION_DOES_DROP_VTPM(handoff[me]); printf("does %d DROP_VTPM\n", me); ENDS } \
    :: atomic { rule[me] == 0 && IS_DESTINATION(K) && destination[K] == EXPECTING && COMES_DESTINATION_ABORT(K) && true -> handoff[me] = K; printf("begins %d %d DESTINATION EXPECTING ABORT\n", me, K); DESTINATION_BECOMES(handoff[me], EMPTY); printf("becomes %d EMPTY\n", me); DESTINATION_DOES_DROP_VTPM(handoff[me]); printf("does %d DROP_VTPM\n", me); ENDS } \
    :: atomic { rule[me] == 0 && IS_DESTINATION(K) && destination[K] == EXPECTING && COMES_DESTINATION_LINK_LOST(K) && true -> handoff[me] = K; USES_DESTINATION_LINK_LOST(K); printf("begins %d %d DESTINATION EXPECTING LINK_LOST\n", me, K); DESTINATION_BECOMES(handoff[me], EMPTY); printf("becomes %d EMPTY\n", me); DESTINATION_DOES_DROP_VTPM(handoff[me]); printf("does %d DROP_VTPM\n", me); ENDS } \
    :: atomic { failures > 0 && !calm && rule[me] == 0 && IS_DESTINATION(K) && destination[K] == PREPARED && COMES_DESTINATION_COMMIT(K) && true -> handoff[me] = K; printf("begins %d %d DESTINATION PREPARED COMMIT\n", me, K); DESTINATION_FAILS_TO_STORE(handoff[me], LIVE); ENDS } \
    :: atomic { rule[me] == 0 && IS_DESTINATION(K) && destination[K] == PREPARED && COMES_DESTINATION_COMMIT(K) && true -> handoff[me] = K; printf("begins %d %d DESTINATION PREPARED COMMIT\n", me, K); DESTINATION_STORES(handoff[me], LIVE); printf("stores %d LIVE\n", me); rule[me] = 24; step[me] = 1 } \
    :: atomic { failures > 0 && !calm && rule[me] == 0 && IS_DESTINATION(K) && destination[K] == PREPARED && COMES_DESTINATION_ABORT(K) && true -> handoff[me] = K; printf("begins %d %d DESTINATION PREPARED ABORT\n", me, K); DESTINATION_FAILS_TO_STORE(handoff[me], EMPTY); ENDS } \
    :: atomic { rule[me] == 0 && IS_DESTINATION(K) && destination[K] == PREPARED && COMES_DESTINATION_ABORT(K) && true -> handoff[me] = K; printf("begins %d %d DESTINATION PREPARED ABORT\n", me, K); DESTINATION_STORES(handoff[me], EMPTY); printf("stores %d EMPTY\n", me); rule[me] = 25; step[me] = 1 } \
    :: atomic { rule[me] == 0 && IS_DESTINATION(K) && destination[K] == PREPARED && COMES_DESTINATION_LINK_LOST(K) && true -> handoff[me] = K; USES_DESTINATION_LINK_LOST(K); printf("begins %d %d DESTINATION PREPARED LINK_LOST\n", me, K); DESTINATION_BECOMES(handoff[me], PREPARED); printf("becomes %d PREPARED\n", me); ENDS } \
    :: atomic { rule[me] == 0 && IS_DESTINATION(K) && destination[K] == LIVE && COMES_DESTINATION_COMMIT(K) && (!calm || !receipt_carried[K]) -> handoff[me] = K; printf("begins %d %d DESTINATION LIVE COMMIT\n", me, K); DESTINATION_BECOMES(handoff[me], LIVE); printf("becomes %d LIVE\n", me); DESTINATION_DOES_TELL_RECEIPT(handoff[me]); printf("does %d TELL_RECEIPT\n", me); ENDS } \
    :: atomic { rule[me] == 0 && IS_DESTINATION(K) && destination[K] == LIVE && COMES_DESTINATION_ASK_RECEIPT(K) && (!calm || !receipt_carried[K]) -> handoff[me] = K; printf("begins %d %d DESTINATION LIVE ASK_RECEIPT\n", me, K); DESTINATION_BECOMES(handoff[me], LIVE); printf("becomes %d LIVE\n", me); DESTINATION_DOES_TELL_RECEIPT(handoff[me]); printf("does %d TELL_RECEIPT\n", me); ENDS } \
    :: atomic { rule[me] == 0 && IS_DESTINATION(K) && destination[K] == LIVE && COMES_DESTINATION_LINK_LOST(K) && true -> handoff[me] = K; USES_DESTINATION_LINK_LOST(K); printf("begins %d %d DESTINATION LIVE LINK_LOST\n", me, K); DESTINATION_BECOMES(handoff[me], LIVE); printf("becomes %d LIVE\n", me); ENDS } \
    :: atomic { rule[me] == 0 && IS_DESTINATION(K) && destination[K] == EMPTY && COMES_DESTINATION_ABORT(K) && (!calm) -> handoff[me] = K; printf("begins %d %d DESTINATION EMPTY ABORT\n", me, K); DESTINATION_BECOMES(handoff[me], EMPTY); printf("becomes %d EMPTY\n", me); ENDS } \
    :: atomic { rule[me] == 0 && IS_DESTINATION(K) && destination[K] == EMPTY && COMES_DESTINATION_LINK_LOST(K) && true -> handoff[me] = K; USES_DESTINATION_LINK_LOST(K); printf("begins %d %d DESTINATION EMPTY LINK_LOST\n", me, K); DESTINATION_BECOMES(handoff[me], EMPTY); printf("becomes %d EMPTY\n", me); ENDS }

#define DESTINATION_GOES_ON \
    :: atomic { rule[me] == 19 && step[me] == 1 -> DESTINATION_DOES_SEND_PREPARED(handoff[me]); printf("does %d SEND_PREPARED\n", me); ENDS } \
    :: atomic { rule[me] == 24 && step[me] == 1 -> DESTINATION_DOES_RUN_VTPM(handoff[me]); printf("does %d RUN_VTPM\n", me); DESTINATION_DOES_TELL_RECEIPT(handoff[me]); printf("does %d TELL_RECEIPT\n", me); ENDS } \
    :: atomic { rule[me] == 25 && step[me] == 1 -> DESTINATION_DOES_DROP_VTPM(handoff[me]); printf("does %d DROP_VTPM\n", me); ENDS }

#define DESTINATION_FORGETS_TO EMPTY
#define DESTINATION_AFTER_CRASH(state) \
    ((state) == EMPTY -> EMPTY : ((state) == LIVE -> LIVE : ((state) == PREPARED -> PREPARED : ((state) == EXPECTING -> EMPTY : EMPTY))))
