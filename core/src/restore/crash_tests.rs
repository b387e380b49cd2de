//! Runs whole restores against a small model of Ceph and Kubernetes, killing the process at every point.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;

use super::*;

const LIVE: &str = "csi-vol-1";
const ASIDE: &str = "csi-vol-1.howdah-0a1b2c3d";
const INCOMING: &str = "csi-vol-1.howdah-new-0a1b2c3d";
const SAFETY: &str = "howdah-pre-restore-0a1b2c3d";
const OLD_ID: &str = "old";

fn created() -> Timestamp {
    "2026-11-22T12:00:00Z".parse().unwrap()
}

fn order(goal: Goal, method: Method) -> Order {
    Order {
        name: "db-restore".to_owned(),
        uid: "0a1b2c3d-0000-4000-8000-000000000000".to_owned(),
        created: created(),
        goal,
        method,
    }
}

fn swap() -> Order {
    order(Goal::Newest, Method::Swap)
}

fn rollback() -> Order {
    order(Goal::Newest, Method::Rollback)
}

fn undo_of_swap() -> Order {
    order(Goal::Undo("earlier".to_owned()), Method::Swap)
}

fn image(name: &str, id: &str) -> ImageRecord {
    ImageRecord {
        pool: "replicapool".to_owned(),
        rados_namespace: String::new(),
        name: name.to_owned(),
        id: id.to_owned(),
    }
}

fn transient() -> Problem {
    Problem::new(FailureKind::Transient, "the world said no", "ask again")
}

/// What an image holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Data {
    /// What the database wrote until it was stopped.
    Current,
    /// What is to be restored.
    Wanted,
    /// Half a clone, or half a rollback.
    Mixture,
}

/// What survives the death of the scheduler.
#[derive(Clone)]
struct World {
    images: BTreeMap<String, String>,
    data: BTreeMap<String, Data>,
    snapshots: BTreeMap<String, Data>,
    trash: BTreeSet<String>,
    made: u32,
    journal: String,
    gate: Option<String>,
    replicas: i32,
    replicas_before: i32,
    /// What the preflight says they are to be; `None` for the same.
    replicas_after: Option<i32>,
    now: Timestamp,
    /// Looks at the proofs until they hold.
    unproven: u32,
    /// Looks until PostgreSQL answers.
    silent: u32,
    /// Effects still to fail, by their order.
    script: VecDeque<bool>,
    undo: bool,
}

impl World {
    fn new(order: &Order) -> Self {
        let undo = matches!(order.goal, Goal::Undo(_));
        let mut world = Self {
            images: [(LIVE.to_owned(), OLD_ID.to_owned())].into(),
            data: [(OLD_ID.to_owned(), Data::Current)].into(),
            snapshots: BTreeMap::new(),
            trash: BTreeSet::new(),
            made: 0,
            journal: OLD_ID.to_owned(),
            gate: None,
            replicas: 1,
            replicas_before: 1,
            replicas_after: None,
            now: created(),
            unproven: 0,
            silent: 0,
            script: VecDeque::new(),
            undo,
        };
        if undo {
            world.images.insert("csi-vol-1.howdah-earlier".to_owned(), "safe".to_owned());
            world.data.insert("safe".to_owned(), Data::Wanted);
        }
        world
    }

    fn stopped(order: &Order) -> Self {
        Self { replicas: 0, replicas_before: 0, ..Self::new(order) }
    }

    /// A StatefulSet beside the original: it stands stopped and is started, or, on an undo, runs and is stopped.
    fn beside(order: &Order) -> Self {
        match order.goal {
            Goal::Undo(_) => Self { replicas_after: Some(0), ..Self::new(order) },
            _ => Self { replicas_after: Some(1), ..Self::stopped(order) },
        }
    }

    /// All ways in which a database may stand that `order` is for.
    fn all(order: &Order) -> Vec<Self> {
        let mut worlds = vec![Self::new(order), Self::stopped(order)];
        // Only a swap leads into another StatefulSet.
        if order.method == Method::Swap {
            worlds.push(Self::beside(order));
        }
        worlds
    }

    /// What the replicas are in the end.
    fn replicas_in(&self, phase: Phase) -> i32 {
        match phase {
            Phase::Completed => self.replicas_after.unwrap_or(self.replicas_before),
            _ => self.replicas_before,
        }
    }

    fn name_of(&self, id: &str) -> Option<String> {
        self.images.iter().find(|(_, found)| *found == id).map(|(name, _)| name.clone())
    }

    /// What the adapter does: by id, and only if the name is free.
    fn give_name(&mut self, id: &str, name: &str) {
        self.may_change();
        let current = self.name_of(id).unwrap();
        if current != name {
            assert!(!self.images.contains_key(name), "{name} is taken");
            self.images.remove(&current);
            self.images.insert(name.to_owned(), id.to_owned());
        }
    }

    /// Nothing in the storage is changed while the database could run, or others could start it.
    fn may_change(&self) {
        assert_eq!(self.replicas, 0, "the storage is changed under a running database");
        assert_eq!(
            self.gate.as_deref(),
            Some("restore/db-restore"),
            "the storage is changed with the gate open"
        );
    }

    /// Performs `effect`; `half` lets the process die in the middle of it.
    fn perform(
        &mut self,
        effect: &Effect,
        status: &RestoreStatus,
        order: &Order,
        half: bool,
    ) -> Option<Event> {
        self.now += SignedDuration::from_secs(1);
        let scripted = !matches!(effect, Effect::Announce | Effect::Wait { .. });
        if scripted && self.script.pop_front().unwrap_or(false) {
            return Some(Event::Failed(transient()));
        }
        let live = status.image.as_ref();
        let incoming = status.incoming.as_ref().map(|image| image.id.clone());
        Some(match effect {
            Effect::Announce => return None,
            Effect::Wait { until } => {
                self.now = self.now.max(*until);
                Event::RetryDue
            }
            Effect::Preflight => Event::PreflightPassed(Box::new(Facts {
                source: Source {
                    name: "db-20261122030000".to_owned(),
                    taken_at: Some(created()),
                    consistency: None,
                    image: image(LIVE, OLD_ID),
                    snapshot: None,
                },
                method: order.method,
                volume: VolumeRecord {
                    claim: "data-db-0".to_owned(),
                    volume: "pvc-1".to_owned(),
                    journal: None,
                },
                image: image(LIVE, OLD_ID),
                size: 1 << 30,
                replicas: self.replicas,
                replicas_after: self.replicas_after,
                grace: SignedDuration::from_secs(300),
                incoming: self.undo.then(|| image("csi-vol-1.howdah-earlier", "safe")),
            })),
            Effect::CloseGate => {
                self.gate = Some(order.gate());
                Event::GateClosed
            }
            Effect::Stop => {
                self.replicas = 0;
                Event::Stopped
            }
            Effect::Prove => {
                let holds = self.unproven == 0;
                self.unproven = self.unproven.saturating_sub(1);
                let seen = if holds { "no watcher" } else { "10.0.0.1 has the image open" };
                let proofs = vec![Proof { what: "no watcher".to_owned(), holds, seen: seen.to_owned() }];
                if holds { Event::Proven(proofs) } else { Event::Unproven(proofs) }
            }
            Effect::Prepare if self.undo => Event::Prepared(status.incoming.clone().unwrap()),
            Effect::Prepare => {
                self.may_change();
                self.images.remove(INCOMING);
                self.made += 1;
                let id = format!("new-{}", self.made);
                self.images.insert(INCOMING.to_owned(), id.clone());
                self.data.insert(id.clone(), if half { Data::Mixture } else { Data::Wanted });
                Event::Prepared(image(INCOMING, &id))
            }
            Effect::SetAside => {
                self.give_name(OLD_ID, ASIDE);
                Event::SetAside
            }
            Effect::Place => {
                self.give_name(&incoming.unwrap(), LIVE);
                Event::Placed
            }
            Effect::Book => {
                self.may_change();
                self.journal = incoming.unwrap();
                Event::Booked
            }
            Effect::Safeguard => {
                self.may_change();
                self.snapshots.entry(SAFETY.to_owned()).or_insert(self.data[OLD_ID]);
                Event::Safeguarded(SnapshotRecord { name: SAFETY.to_owned(), id: 9, size: 1 << 30 })
            }
            Effect::RollBack => {
                self.may_change();
                assert!(self.snapshots.contains_key(SAFETY), "rolled back without a safety snapshot");
                self.data.insert(OLD_ID.to_owned(), if half { Data::Mixture } else { Data::Wanted });
                Event::RolledBack
            }
            Effect::PutBack => {
                self.may_change();
                match status.method.unwrap() {
                    Method::Swap => {
                        let id = incoming.or_else(|| self.images.get(INCOMING).cloned());
                        let own = status.incoming.as_ref().map_or(INCOMING, |image| image.name.as_str());
                        // One that an earlier try removed is nowhere.
                        let id = id.filter(|id| self.name_of(id).is_some());
                        if let Some(id) = &id {
                            self.give_name(id, own);
                        }
                        self.give_name(OLD_ID, LIVE);
                        self.journal = live.unwrap().id.clone();
                        if let Some(id) = id.filter(|_| !self.undo) {
                            self.images.remove(INCOMING);
                            if status.started {
                                self.trash.insert(id);
                            }
                        }
                    }
                    Method::Rollback => {
                        if status.safety_snapshot.is_some() {
                            self.data.insert(OLD_ID.to_owned(), self.snapshots[SAFETY]);
                        } else {
                            self.snapshots.remove(SAFETY);
                        }
                    }
                }
                Event::PutBack
            }
            Effect::Start { replicas } => {
                let id = &self.images[LIVE];
                assert_ne!(self.data[id], Data::Mixture, "started on a mixture");
                assert_eq!(self.journal, *id, "started before ceph-csi knew the image");
                assert!(self.gate.is_some(), "started with the gate open");
                self.replicas = *replicas;
                Event::Started
            }
            Effect::Ask if self.silent > 0 => {
                self.silent -= 1;
                Event::Silent { seen: "the pod is not ready".to_owned() }
            }
            Effect::Ask => Event::Answered(Answer::Sql),
            Effect::OpenGate => {
                self.gate = None;
                Event::GateOpened
            }
        })
    }
}

/// What happens to the process at an effect, counted in effects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    /// It dies before it performs it.
    Before(usize),
    /// It dies in the middle of it.
    Within(usize),
    /// It dies after it, before the event is written down.
    After(usize),
    /// It lives, and somebody asks to put everything back.
    Undo(usize),
}

/// Runs to the end under `blows`; returns the final status and the number of effects performed.
fn run(order: &Order, world: &mut World, blows: &[Blow]) -> (RestoreStatus, usize) {
    run_from(order, world, RestoreStatus::default(), Event::Resumed, blows)
}

fn run_from(
    order: &Order,
    world: &mut World,
    mut written: RestoreStatus,
    mut event: Event,
    blows: &[Blow],
) -> (RestoreStatus, usize) {
    let mut performed = 0;
    // Far above what any run needs; reaching it means the machine does not end.
    for _ in 0..10_000 {
        let (status, effects) = next(order, &written, event, world.now).unwrap();
        written = status;
        let Some(effect) = effects.first() else { return (written, performed) };
        assert_eq!(effects.len(), 1);
        let at = performed;
        performed += 1;
        if blows.contains(&Blow::Before(at)) {
            written = read_again(&written);
            event = Event::Resumed;
            continue;
        }
        let half = blows.contains(&Blow::Within(at));
        let answer = world.perform(effect, &written, order, half);
        if half || blows.contains(&Blow::After(at)) {
            written = read_again(&written);
            event = Event::Resumed;
            continue;
        }
        match answer {
            Some(_) if blows.contains(&Blow::Undo(at)) => {
                event = Event::Asked(Request::Undo { token: "undo/1".to_owned() });
            }
            Some(next_event) => event = next_event,
            None => {
                assert!(written.phase.is_terminal(), "{:?} has no way on", written.phase);
                return (written, performed);
            }
        }
    }
    panic!("the operation does not end");
}

/// What is read after a restart went through JSON.
fn read_again(status: &RestoreStatus) -> RestoreStatus {
    serde_json::from_str(&serde_json::to_string(status).unwrap()).unwrap()
}

/// What must hold whatever happened.
fn check(order: &Order, status: &RestoreStatus, world: &World) {
    assert!(status.finished_at.is_some());
    assert!(status.steps.iter().all(|step| step.outcome.is_some() && step.took_ms.is_some()));
    if status.phase == Phase::Stuck {
        let failure = status.failure.as_ref().unwrap();
        // Whoever dies while it opens the gate cannot know whether it is open: everything else is done by then.
        let closed = world.gate.as_deref() == Some("restore/db-restore");
        assert!(closed || failure.step == Phase::Opening, "stuck in {:?} with the gate open", failure.step);
        assert!(failure.cure.contains("kubectl howdah restore retry db-restore"), "{failure:?}");
        return;
    }
    assert_eq!(world.gate, None, "{:?} with the gate closed", status.phase);
    assert_eq!(world.replicas, world.replicas_in(status.phase));
    let live = &world.images[LIVE];
    assert_eq!(world.journal, *live, "ceph-csi would delete another image than the one in place");
    match status.phase {
        Phase::Completed => {
            assert_eq!(world.data[live], Data::Wanted);
            assert!(status.failure.is_none());
            match order.method {
                Method::Swap => {
                    let safety = status.safety_image.as_ref().unwrap();
                    assert_eq!((safety.name.as_str(), safety.id.as_str()), (ASIDE, OLD_ID));
                    assert_eq!(world.images[ASIDE], OLD_ID, "the safety copy is gone");
                    assert_eq!(world.data[OLD_ID], Data::Current);
                    assert_eq!(world.images.len(), 2, "an image is left over: {:?}", world.images);
                }
                Method::Rollback => {
                    assert_eq!(world.snapshots[SAFETY], Data::Current, "the safety copy is wrong");
                    assert_eq!(status.safety_snapshot.as_ref().unwrap().name, SAFETY);
                }
            }
        }
        Phase::Failed => {
            assert_eq!(*live, OLD_ID);
            assert_eq!(world.data[OLD_ID], Data::Current, "the data is not what it was");
            let failure = status.failure.as_ref().unwrap();
            assert!(!failure.reason.is_empty() && !failure.cure.is_empty());
            assert!(!world.images.contains_key(INCOMING) && !world.images.contains_key(ASIDE));
        }
        other => panic!("{other:?} is no end"),
    }
}

fn orders() -> [Order; 3] {
    [swap(), rollback(), undo_of_swap()]
}

#[test]
fn a_swap_and_a_rollback_go_through_their_phases() {
    for (order, acts) in [
        (swap(), &[Phase::Preparing, Phase::SettingAside, Phase::Placing, Phase::Bookkeeping][..]),
        (rollback(), &[Phase::Safeguarding, Phase::RollingBack]),
    ] {
        let mut world = World::new(&order);
        let (status, _) = run(&order, &mut world, &[]);
        check(&order, &status, &world);
        assert_eq!(status.phase, Phase::Completed);
        let phases: Vec<Phase> = status.steps.iter().map(|step| step.phase).collect();
        let wanted: Vec<Phase> = [Phase::Preflight, Phase::Gating, Phase::Stopping, Phase::Proving]
            .iter()
            .chain(acts)
            .chain(&[Phase::Starting, Phase::Answering, Phase::Opening])
            .copied()
            .collect();
        assert_eq!(phases, wanted);
        assert!(status.proofs.iter().all(|proof| proof.holds));
        assert_eq!(status.safety_until, Some(created() + SAFETY_RETENTION));
    }
}

#[test]
fn a_death_at_any_point_ends_the_same() {
    for order in orders() {
        for world in World::all(&order) {
            let (_, effects) = run(&order, &mut world.clone(), &[]);
            for at in 0..effects {
                for blow in [Blow::Before(at), Blow::Within(at), Blow::After(at)] {
                    let mut world = world.clone();
                    let (status, _) = run(&order, &mut world, &[blow]);
                    check(&order, &status, &world);
                    assert_eq!(status.phase, Phase::Completed, "{order:?} {blow:?}");
                }
            }
        }
    }
}

#[test]
fn a_failure_at_any_point_is_tried_again() {
    for order in orders() {
        for world in World::all(&order) {
            let (_, effects) = run(&order, &mut world.clone(), &[]);
            for failing in 0..effects - 1 {
                let mut world = world.clone();
                world.script = (0..=failing).map(|i| i == failing).collect();
                let (status, _) = run(&order, &mut world, &[]);
                check(&order, &status, &world);
                assert_eq!(status.phase, Phase::Completed, "{order:?} {failing}");
            }
        }
    }
}

#[test]
fn what_fails_for_good_is_put_back_or_stuck_and_can_be_retried_and_undone() {
    for (order, fresh) in
        orders().iter().flat_map(|order| World::all(order).into_iter().map(move |w| (order, w)))
    {
        let (_, effects) = run(order, &mut fresh.clone(), &[]);
        for failing in 0..effects - 1 {
            let mut world = fresh.clone();
            let tries = PHASE_RETRIES_MAX.max(ATTEMPTS_MAX) as usize + 1;
            world.script = (0..failing + tries).map(|i| i >= failing).collect();
            let (status, _) = run(order, &mut world, &[]);
            check(order, &status, &world);
            assert_ne!(status.phase, Phase::Completed);
            if status.phase != Phase::Stuck {
                continue;
            }
            world.script.clear();
            for (request, end) in [
                (Request::Retry { token: "retry/1".to_owned() }, Phase::Completed),
                (Request::Undo { token: "undo/1".to_owned() }, Phase::Failed),
            ] {
                let mut world = world.clone();
                let asked = Event::Asked(request);
                let (status, _) = run_from(order, &mut world, status.clone(), asked, &[]);
                check(order, &status, &world);
                assert_eq!(status.phase, end, "{order:?} failing {failing}");
            }
        }
    }
}

#[test]
fn an_undo_asked_at_any_point_puts_everything_back_even_when_it_dies_there() {
    for order in orders() {
        for world in World::all(&order) {
            let (_, effects) = run(&order, &mut world.clone(), &[]);
            for at in 0..effects - 1 {
                let (status, performed) = {
                    let mut world = world.clone();
                    let (status, performed) = run(&order, &mut world, &[Blow::Undo(at)]);
                    check(&order, &status, &world);
                    (status, performed)
                };
                assert_eq!(status.phase, Phase::Failed, "{order:?} {at}");
                for second in at + 1..performed {
                    for blow in [Blow::Before(second), Blow::After(second)] {
                        let mut world = world.clone();
                        let (status, _) = run(&order, &mut world, &[Blow::Undo(at), blow]);
                        check(&order, &status, &world);
                        assert_eq!(status.phase, Phase::Failed, "{order:?} {at} {blow:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_clone_that_was_written_to_is_kept_when_it_is_put_back() {
    let order = swap();
    let mut world = World { silent: u32::MAX, ..World::new(&order) };
    let (status, _) = run(&order, &mut world, &[]);
    check(&order, &status, &world);
    assert_eq!(status.phase, Phase::Stuck);
    let clone = world.images[LIVE].clone();
    let undo = Event::Asked(Request::Undo { token: "undo/1".to_owned() });
    let (status, _) = run_from(&order, &mut world, status, undo, &[]);
    check(&order, &status, &world);
    assert_eq!(status.phase, Phase::Failed);
    assert!(world.trash.contains(&clone), "what was written while it answered is lost");
}

#[test]
fn a_missing_proof_is_waited_for_and_then_named() {
    for order in orders() {
        let mut world = World { unproven: 5, ..World::new(&order) };
        let (status, _) = run(&order, &mut world, &[]);
        check(&order, &status, &world);
        assert_eq!(status.phase, Phase::Completed);

        let mut world = World { unproven: u32::MAX, ..World::new(&order) };
        let before = world.clone();
        let (status, _) = run(&order, &mut world, &[]);
        check(&order, &status, &world);
        assert_eq!(status.phase, Phase::Stuck);
        let failure = status.failure.as_ref().unwrap();
        assert_eq!(failure.step, Phase::Proving);
        assert!(failure.reason.contains("10.0.0.1 has the image open"), "{failure:?}");
        assert_eq!((&world.images, &world.data), (&before.images, &before.data), "the storage was changed");
        let waited = status.finished_at.unwrap().duration_since(created());
        assert!(waited > PROOF_LIMIT + SignedDuration::from_secs(300), "{waited}");
    }
}

#[test]
fn a_restart_does_not_prolong_the_wait() {
    let order = swap();
    let mut world = World { unproven: u32::MAX, ..World::new(&order) };
    let deaths: Vec<Blow> = (0..2000).step_by(7).map(Blow::After).collect();
    let (status, _) = run(&order, &mut world, &deaths);
    assert_eq!(status.phase, Phase::Stuck);
    assert!(status.steps.len() <= STEPS_MAX);
}

#[test]
fn a_stopped_database_stays_stopped() {
    let order = swap();
    let mut world = World::stopped(&order);
    let (status, _) = run(&order, &mut world, &[]);
    check(&order, &status, &world);
    assert_eq!((status.phase, status.started), (Phase::Completed, false));
    assert!(status.conditions.iter().any(|condition| condition.reason == "Stopped"));
}

#[test]
fn a_copy_is_started_and_an_undo_of_it_stops_it_again() {
    let order = swap();
    let mut world = World::beside(&order);
    let (status, _) = run(&order, &mut world, &[]);
    check(&order, &status, &world);
    assert_eq!((status.phase, status.started, world.replicas), (Phase::Completed, true, 1));
    assert!(status.conditions.iter().any(|condition| condition.reason == "Sql"));

    let order = undo_of_swap();
    let mut world = World::beside(&order);
    let (status, _) = run(&order, &mut world, &[]);
    check(&order, &status, &world);
    assert_eq!((status.phase, status.started, world.replicas), (Phase::Completed, false, 0));
    let stopped = status.conditions.iter().find(|condition| condition.reason == "Stopped").unwrap();
    assert!(stopped.message.contains("as it was before the restore"), "{stopped:?}");
}

#[test]
fn a_refusal_touches_nothing() {
    let order = swap();
    let status = RestoreStatus { phase: Phase::Preflight, attempt: 1, ..RestoreStatus::default() };
    let problem = Problem::new(FailureKind::Permanent, "there is no backup x", "name another");
    let (status, effects) = next(&order, &status, Event::Failed(problem), created()).unwrap();
    assert_eq!((status.phase, effects), (Phase::Failed, vec![Effect::Announce]));
    assert_eq!(status.failure.unwrap().cure, "name another");
}

#[test]
fn a_request_is_read_once() {
    let status = RestoreStatus { resumed: Some("retry/1".to_owned()), ..RestoreStatus::default() };
    assert_eq!(Request::read("retry/1", &status), None);
    assert_eq!(Request::read("retry/2", &status), Some(Request::Retry { token: "retry/2".to_owned() }));
    assert_eq!(Request::read("undo", &status), Some(Request::Undo { token: "undo".to_owned() }));
    assert_eq!(Request::read("please", &status), None);
}

#[test]
fn an_impossible_event_is_an_error_and_not_a_step() {
    let order = swap();
    for (phase, event) in [
        (Phase::Reserved, Event::Placed),
        (Phase::Proving, Event::Booked),
        (Phase::Completed, Event::GateOpened),
        (Phase::Stuck, Event::RetryDue),
    ] {
        let status = RestoreStatus { phase, ..RestoreStatus::default() };
        let error = next(&order, &status, event, created()).unwrap_err();
        assert_eq!(error.phase, phase);
    }
}

fn any_blow() -> impl Strategy<Value = Blow> {
    (0_usize..60, 0_u8..4).prop_map(|(at, kind)| match kind {
        0 => Blow::Before(at),
        1 => Blow::Within(at),
        2 => Blow::After(at),
        _ => Blow::Undo(at),
    })
}

#[test]
fn a_death_anywhere_and_failures_without_end_after_it_leave_nothing_unsaid() {
    // More than all tries of all phases.
    const WITHOUT_END: usize = 200;
    for order in orders() {
        for world in World::all(&order) {
            let (_, effects) = run(&order, &mut world.clone(), &[]);
            for death in 0..effects {
                for good in 0..=effects {
                    let mut world = world.clone();
                    world.script = std::iter::repeat_n(false, good).collect();
                    world.script.extend(std::iter::repeat_n(true, WITHOUT_END));
                    let (status, _) = run(&order, &mut world, &[Blow::Within(death)]);
                    check(&order, &status, &world);
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn every_history_of_failures_deaths_and_requests_ends_well(
        which in 0_usize..3,
        standing in any::<proptest::sample::Index>(),
        unproven in 0_u32..4,
        silent in 0_u32..4,
        script in proptest::collection::vec(any::<bool>(), 0..30),
        blows in proptest::collection::vec(any_blow(), 0..5),
    ) {
        let order = orders()[which].clone();
        let worlds = World::all(&order);
        let mut world = worlds[standing.index(worlds.len())].clone();
        world.unproven = unproven;
        world.silent = silent;
        world.script = script.into();
        let (status, _) = run(&order, &mut world, &blows);
        check(&order, &status, &world);
    }
}
