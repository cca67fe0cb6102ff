/* The handoff of a vTPM between two secure processors, in a world that does its worst.
 *
 * Two secure processors, 0 and 1; the vTPM begins in 0. Up to HANDOFFS handoffs, one after the other, each from whichever has the
 * vTPM to the other. In any order: links that break with messages under way; carriers that have every token that was ever told
 * and bring it at any time, any number of times, or never; hypervisors that stop, cancel, ask and boot; CRASHES crashes of
 * each side, between any two steps; FAILURES steps that fail; strangers who connect and say what they like.
 *
 * At some moment `calm` begins: no more faults, and whoever carries tokens tries again and again. All tokens told until then may
 * have been lost.
 *
 * What each rule does comes from handoff_rules.pml. A part of it that is atomic here ends with what lasts beyond the memory of
 * one side: a crash, or the other side, can tell no difference in between.
 *
 * To see it fail, define what the rules rest on away: OFFERS_TO_ANYONE, TOKENS_ARE_NOT_CHECKED, OTHERS_PICK_IDS,
 * FAILED_STORES_MAY_LAST. NEVER_CALM leaves the end out, which safety does not need. WALKS is for walks at random.
 */
#ifndef HANDOFFS
#define HANDOFFS 2
#endif
#ifndef CRASHES
#define CRASHES 2
#endif
#ifndef FAILURES
#define FAILURES 1
#endif

#include "handoff_rules.pml"

#define NONE 0

/* Of each secure processor. */
bool owns[2];    /* durable: the vTPM is its own, and its VM can be booted here */
bool process[2]; /* a process has the vTPM that is its own */
bool running[2]; /* and the guest can use it */
byte crashes[2];
byte rule[2], step[2], handoff[2]; /* what it is at */

/* Of each handoff: in memory, and in durable memory. */
byte begun;
byte from[HANDOFFS];
byte source[HANDOFFS], source_disk[HANDOFFS];
byte destination[HANDOFFS], destination_disk[HANDOFFS];
bool copy[HANDOFFS]; /* at the destination, a process has the state that came */
bool authenticated[HANDOFFS], stranger[HANDOFFS];

/* Its link: whether each side has not seen its end, whether it is cut, what is under way. */
bool source_end[HANDOFFS], destination_end[HANDOFFS], cut[HANDOFFS];
bool state_sent[HANDOFFS], prepared_sent[HANDOFFS];

/* Its tokens: whether somebody still has them, and whether they ever were told. */
bool commit_carried[HANDOFFS], abort_carried[HANDOFFS], receipt_carried[HANDOFFS];
bool commit_told[HANDOFFS], abort_told[HANDOFFS];

byte failures = FAILURES;
bool calm;

/* Set once something is wrong. */
bool state_told_to_stranger, given_up_too_early, thrown_away, both_told, crash_rule_is_wrong;

#define IS_SOURCE(K) (K < begun && from[K] == me)
#define IS_DESTINATION(K) (K < begun && from[K] == 1 - me && !stranger[K])
#define ENDS rule[me] = 0; step[me] = 0; handoff[me] = 0
/* What fails ends the link, or the other side would wait for ever. */
#define FAILS(K) failures--; cut[K] = true; printf("fails %d\n", me)

/* Chance takes every option alike, and would seldom let a handoff get far: on a walk at random, misfortune has its times. */
#ifdef WALKS
byte luck;
#define MISFORTUNE (luck == 0)
#else
#define MISFORTUNE true
#endif

/* Which event may come. A rule says in which state it leads anywhere. */
#define COMES_SOURCE_STOP(K) running[me]
#define COMES_SOURCE_CANCEL(K) MISFORTUNE
#define COMES_SOURCE_LINK_LOST(K) (source_end[K] && cut[K])
#define COMES_SOURCE_PREPARED(K) (source_end[K] && (prepared_sent[K] || stranger[K]))
#define COMES_SOURCE_RECEIPT(K) receipt_carried[K]
#define COMES_SOURCE_ASK_COMMIT(K) true
#define COMES_SOURCE_ASK_ABORT(K) true
#define COMES_DESTINATION_STATE(K) (destination_end[K] && state_sent[K])
#define COMES_DESTINATION_CANCEL(K) MISFORTUNE
#define COMES_DESTINATION_LINK_LOST(K) (destination_end[K] && cut[K])
#ifdef TOKENS_ARE_NOT_CHECKED
#define COMES_DESTINATION_COMMIT(K) true
#define COMES_DESTINATION_ABORT(K) true
#else
#define COMES_DESTINATION_COMMIT(K) commit_carried[K]
#define COMES_DESTINATION_ABORT(K) abort_carried[K]
#endif
#define COMES_DESTINATION_ASK_RECEIPT(K) true

/* What the acts do. */
#define SOURCE_DOES_STOP_VTPM(K) running[me] = false
#define SOURCE_DOES_RUN_VTPM(K) running[me] = process[me]
#define SOURCE_DOES_DROP_VTPM(K) process[me] = false
#define SOURCE_DOES_SEND_STATE(K) \
    state_told_to_stranger = state_told_to_stranger || !authenticated[K]; \
    state_sent[K] = source_end[K] && !cut[K]
#define SOURCE_DOES_TELL_COMMIT(K) \
    commit_carried[K] = true; commit_told[K] = true; both_told = both_told || abort_told[K]
#define SOURCE_DOES_TELL_ABORT(K) \
    abort_carried[K] = true; abort_told[K] = true; both_told = both_told || commit_told[K]
#define DESTINATION_DOES_LOAD_VTPM(K) copy[K] = true
#define DESTINATION_DOES_RUN_VTPM(K) \
    process[me] = copy[K]; running[me] = copy[K]; copy[K] = false
#define DESTINATION_DOES_DROP_VTPM(K) copy[K] = false
#define DESTINATION_DOES_SEND_PREPARED(K) prepared_sent[K] = destination_end[K] && !cut[K]
#define DESTINATION_DOES_TELL_RECEIPT(K) receipt_carried[K] = true

/* What is no more, once a side has taken up the event. */
#define USES_SOURCE_PREPARED(K) prepared_sent[K] = false
#define USES_SOURCE_LINK_LOST(K) source_end[K] = false; prepared_sent[K] = false
#define USES_DESTINATION_STATE(K) state_sent[K] = false
#define USES_DESTINATION_LINK_LOST(K) destination_end[K] = false; state_sent[K] = false

/* The new state. Only GONE gives the vTPM up, at the moment: when a receipt comes late, it may be back. */
#define IS_GIVEN_UP(state) (state == GONE || state == FORGOTTEN)
#define SOURCE_BECOMES(K, state) \
    given_up_too_early = given_up_too_early || (state == GONE && source[K] != GONE && destination_disk[K] != PREPARED); \
    source[K] = state
#define SOURCE_STORES(K, state) \
    SOURCE_BECOMES(K, state); source_disk[K] = state; owns[me] = owns[me] && state != GONE
#define DESTINATION_BECOMES(K, state) \
    thrown_away = thrown_away || (state == EMPTY && destination[K] == PREPARED && IS_GIVEN_UP(source[K])); \
    destination[K] = state
#define DESTINATION_STORES(K, state) \
    DESTINATION_BECOMES(K, state); destination_disk[K] = state; owns[me] = owns[me] || state == LIVE

/* A store that fails has done nothing. The other kind is found after a crash, though it was told to have failed. */
#ifdef FAILED_STORES_MAY_LAST
#define SOURCE_FAILS_TO_STORE(K, state) \
    source_disk[K] = state; owns[me] = owns[me] && state != GONE; FAILS(K)
#define DESTINATION_FAILS_TO_STORE(K, state) \
    destination_disk[K] = state; owns[me] = owns[me] || state == LIVE; FAILS(K)
#else
#define SOURCE_FAILS_TO_STORE(K, state) FAILS(K)
#define DESTINATION_FAILS_TO_STORE(K, state) FAILS(K)
#endif

/* A rule of handoff K may be taken up. */
#define ANY_BEGINS(K) SOURCE_BEGINS(K) DESTINATION_BEGINS(K)

/* What is not durable goes; what is left has to be what the rules say. */
inline crash(K) {
    if
    :: K < begun && from[K] == me ->
        cut[K] = true; source_end[K] = false; prepared_sent[K] = false;
        rest = (source_disk[K] -> source_disk[K] : SOURCE_FORGETS_TO);
        crash_rule_is_wrong = crash_rule_is_wrong || rest != SOURCE_AFTER_CRASH(source[K]);
        source[K] = rest;
        printf("crashes %d %d SOURCE %d\n", me, K, rest)
    :: K < begun && from[K] != me && !stranger[K] ->
        cut[K] = true; destination_end[K] = false; state_sent[K] = false; copy[K] = false;
        rest = (destination_disk[K] -> destination_disk[K] : DESTINATION_FORGETS_TO);
        crash_rule_is_wrong = crash_rule_is_wrong || rest != DESTINATION_AFTER_CRASH(destination[K]);
        thrown_away = thrown_away || (rest == EMPTY && destination[K] == PREPARED && IS_GIVEN_UP(source[K]));
        destination[K] = rest;
        printf("crashes %d %d DESTINATION %d\n", me, K, rest)
    :: else
    fi;
    rest = 0
}

#define NOT_AT_IT(K) !(K < begun && from[K] == me && (source[K] == OFFERING || source[K] == STOPPED))

/* Once for each handoff. */
#if HANDOFFS == 1
#define EACH(X) X(0)
#define ALL(X) X(0)
#elif HANDOFFS == 2
#define EACH(X) X(0) X(1)
#define ALL(X) (X(0) && X(1))
#else
#define EACH(X) X(0) X(1) X(2)
#define ALL(X) (X(0) && X(1) && X(2))
#endif

/* Two have shown each other who they are, or one has not. Nothing begins with one that has not. */
#ifdef OFFERS_TO_ANYONE
#define MAY_OFFER(is_authenticated) true
#else
#define MAY_OFFER(is_authenticated) is_authenticated
#endif
/* Links of earlier handoffs that mean nothing any more are closed, which keeps states apart that are no different. */
#define CLOSES(K) \
    source_end[K] = false; prepared_sent[K] = false; \
    cut[K] = cut[K] || K < begun; \
    destination_end[K] = destination_end[K] && destination[K] == EXPECTING; state_sent[K] = state_sent[K] && destination_end[K];
#define CAN_OFFER (rule[me] == 0 && !calm && begun < HANDOFFS && owns[me] && running[me] && ALL(NOT_AT_IT))
#define OFFERS(is_authenticated) \
    EACH(CLOSES) \
    from[begun] = me; source_end[begun] = true; source[begun] = OFFERING; authenticated[begun] = is_authenticated; \
    stranger[begun] = !is_authenticated; begun++; printf("offers %d %d\n", me, begun - 1)

proctype Processor(bit me) {
    byte rest;
end_of_all:
    do
    EACH(ANY_BEGINS)
    SOURCE_GOES_ON
    DESTINATION_GOES_ON
    :: atomic { /* the hypervisor boots the VM */
        rule[me] == 0 && owns[me] && !process[me] -> process[me] = true; running[me] = true;
        printf("boots %d\n", me) }
    :: atomic { CAN_OFFER && MAY_OFFER(true) ->
        destination[begun] = EXPECTING; destination_end[begun] = true; OFFERS(true) }
    :: atomic { CAN_OFFER && MAY_OFFER(false) -> OFFERS(false) }
    :: atomic { MISFORTUNE && !calm && crashes[me] > 0 ->
        crashes[me]--; running[me] = false; process[me] = false; ENDS;
        crash(0);
#if HANDOFFS > 1
        crash(1);
#endif
#if HANDOFFS > 2
        crash(2);
#endif
    }
    od
}

/* A link breaks at any moment. In the end it breaks if the handoff is over at one of its sides. */
#define IS_OVER(K) (source[K] == ABORTED || destination[K] == EMPTY)
#define BREAKS(K) \
    :: atomic { MISFORTUNE && K < begun && !cut[K] && (source_end[K] || destination_end[K]) && (!calm || IS_OVER(K)) -> cut[K] = true; \
        printf("breaks %d\n", K) }
#define LOSES_TOKENS(K) commit_carried[K] = false; abort_carried[K] = false; receipt_carried[K] = false;

proctype World() {
end_of_all:
    do
    EACH(BREAKS)
#ifdef WALKS
    :: luck = (luck + 1) % 16
#endif
#ifdef OTHERS_PICK_IDS /* a source tells the abort token of a handoff that it does not know, and then begins it */
    :: atomic { !calm && begun < HANDOFFS && !abort_told[begun] -> abort_carried[begun] = true; abort_told[begun] = true }
#endif
#ifndef NEVER_CALM
    :: atomic { !calm -> calm = true; printf("calm\n") }
    :: atomic { !calm -> calm = true; EACH(LOSES_TOKENS) printf("calm, and every token lost\n") }
#endif
    od
}

init {
    atomic {
        owns[0] = true; process[0] = true; running[0] = true; crashes[0] = CRASHES; crashes[1] = CRASHES;
        run Processor(0); run Processor(1); run World()
    }
}

#define IS_SETTLED(K) (K >= begun || ((source[K] == ABORTED || source[K] == FORGOTTEN) \
    && (destination[K] == EMPTY || destination[K] == LIVE || stranger[K]) && !copy[K]))
#define SETTLED (ALL(IS_SETTLED) && owns[0] + owns[1] == 1 && (!process[0] || owns[0]) && (!process[1] || owns[1]))

ltl never_two { [] !(running[0] && running[1]) }
ltl never_two_owners { [] !(owns[0] && owns[1]) }
ltl no_state_to_strangers { [] !state_told_to_stranger }
ltl given_up_only_once_the_other_has_it { [] !given_up_too_early }
ltl never_thrown_away_when_given_up { [] !thrown_away }
ltl never_both_tokens { [] !both_told }
ltl crashes_lead_where_the_rules_say { [] !crash_rule_is_wrong }
ltl ends_with_exactly_one { [] (calm -> <> [] SETTLED) }
