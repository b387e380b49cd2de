//! Runs whole restores against a small model of Ceph and Kubernetes, killing the process at every point: of a database in
//! one image, and of one in several, where it also dies between one image and the next.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;

use super::*;

const SAFETY: &str = "howdah-pre-restore-0a1b2c3d";
/// Images of a database that lies on two volumes beside the one with the data directory.
const SEVERAL: usize = 3;

/// The name that the image of a volume goes by; the first holds the data directory.
fn live(volume: usize) -> String {
    format!("csi-vol-{volume}")
}

fn aside(live: &str) -> String {
    format!("{live}.howdah-0a1b2c3d")
}

fn new(live: &str) -> String {
    format!("{live}.howdah-new-0a1b2c3d")
}

/// The name of the safety copy that an undo takes.
fn earlier(live: &str) -> String {
    format!("{live}.howdah-earlier")
}

/// The id of the image that a volume goes by before the restore.
fn old(volume: usize) -> String {
    format!("old-{volume}")
}

fn safe(volume: usize) -> String {
    format!("safe-{volume}")
}

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
    /// Volumes that the database lies on.
    volumes: usize,
    /// The ids, by the name.
    images: BTreeMap<String, String>,
    /// By the id.
    data: BTreeMap<String, Data>,
    /// The safety snapshots, by the id of the image.
    snapshots: BTreeMap<String, Data>,
    trash: BTreeSet<String>,
    made: u32,
    /// What ceph-csi takes for the image of each volume, by its name.
    journal: BTreeMap<String, String>,
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
    /// Images that such an effect has done when it fails.
    done_at_failure: usize,
    undo: bool,
}

impl World {
    fn new(order: &Order) -> Self {
        Self::of_volumes(order, 1)
    }

    /// A database that lies on several volumes.
    fn several(order: &Order) -> Self {
        Self::of_volumes(order, SEVERAL)
    }

    fn of_volumes(order: &Order, volumes: usize) -> Self {
        let undo = matches!(order.goal, Goal::Undo(_));
        let names: BTreeMap<String, String> =
            (0..volumes).map(|volume| (live(volume), old(volume))).collect();
        let mut world = Self {
            volumes,
            data: names.values().map(|id| (id.clone(), Data::Current)).collect(),
            journal: names.clone(),
            images: names,
            snapshots: BTreeMap::new(),
            trash: BTreeSet::new(),
            made: 0,
            gate: None,
            replicas: 1,
            replicas_before: 1,
            replicas_after: None,
            now: created(),
            unproven: 0,
            silent: 0,
            script: VecDeque::new(),
            done_at_failure: 0,
            undo,
        };
        if undo {
            world.images.extend((0..volumes).map(|volume| (earlier(&live(volume)), safe(volume))));
            world.data.extend((0..volumes).map(|volume| (safe(volume), Data::Wanted)));
        }
        world
    }

    fn stopped(self) -> Self {
        Self { replicas: 0, replicas_before: 0, ..self }
    }

    /// A StatefulSet beside the original: it stands stopped and is started, or, on an undo, runs and is stopped.
    fn beside(self) -> Self {
        match self.undo {
            true => Self { replicas_after: Some(0), ..self },
            false => Self { replicas_after: Some(1), ..self.stopped() },
        }
    }

    /// All ways in which a database may stand that `order` is for.
    fn all(order: &Order) -> Vec<Self> {
        let mut worlds = Vec::new();
        for world in [Self::new(order), Self::several(order)] {
            worlds.push(world.clone());
            worlds.push(world.clone().stopped());
            // Only a swap leads into another StatefulSet.
            if order.method == Method::Swap {
                worlds.push(world.beside());
            }
        }
        worlds
    }

    /// The same world, once for each number of images that an effect may have done when it fails.
    fn failing(&self) -> impl Iterator<Item = Self> {
        (0..self.volumes).map(|done_at_failure| Self { done_at_failure, ..self.clone() })
    }

    /// What each volume holds.
    fn holds(&self) -> Vec<Data> {
        (0..self.volumes).map(|volume| self.data[&self.images[&live(volume)]]).collect()
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

    /// What the preflight finds of one volume.
    fn part(&self, volume: usize) -> RestoredPart {
        let in_place = image(&live(volume), &old(volume));
        RestoredPart {
            name: format!("volume-{volume}"),
            volume: VolumeRecord {
                claim: format!("volume-{volume}-db-0"),
                volume: format!("pvc-{volume}"),
                journal: None,
            },
            image: in_place.clone(),
            size: 1 << 30,
            source_image: in_place,
            source_snapshot: None,
            incoming: self.undo.then(|| image(&earlier(&live(volume)), &safe(volume))),
            safety_image: None,
            safety_snapshot: None,
        }
    }

    fn facts(&self, order: &Order) -> Facts {
        let data = self.part(0);
        Facts {
            source: Source {
                name: "db-20261122030000".to_owned(),
                taken_at: Some(created()),
                consistency: None,
                image: data.source_image,
                snapshot: None,
            },
            method: order.method,
            volume: data.volume,
            image: data.image,
            size: data.size,
            replicas: self.replicas,
            replicas_after: self.replicas_after,
            grace: SignedDuration::from_secs(300),
            incoming: data.incoming,
            parts: (1..self.volumes).map(|volume| self.part(volume)).collect(),
        }
    }

    /// Performs `effect`. With `dies_at` the process dies in it, in the middle of the image of that number: those before
    /// are done, those after are not begun.
    fn perform(
        &mut self,
        effect: &Effect,
        status: &RestoreStatus,
        order: &Order,
        dies_at: Option<usize>,
    ) -> Option<Event> {
        self.now += SignedDuration::from_secs(1);
        let scripted = !matches!(effect, Effect::Announce | Effect::Wait { .. });
        let fails = scripted && self.script.pop_front().unwrap_or(false);
        let pieces = status.pieces().unwrap_or_default();
        // What an effect answers when it is cut short is never heard, or a failure.
        let begun = match (fails, dies_at) {
            (true, _) => self.done_at_failure,
            (false, Some(at)) => at + 1,
            (false, None) => pieces.len(),
        };
        let mut prepared = Vec::new();
        let mut safeguarded = Vec::new();
        for (number, piece) in pieces.iter().enumerate().take(begun) {
            let half = !fails && dies_at == Some(number);
            match effect {
                Effect::Prepare => prepared.push(self.prepare(piece, half)),
                Effect::SetAside => self.give_name(&piece.image.id, &aside(&piece.image.name)),
                Effect::Place => self.give_name(&piece.incoming.unwrap().id, &piece.image.name),
                Effect::Book => self.note(piece, &piece.incoming.unwrap().id),
                Effect::Safeguard => safeguarded.push(self.safeguard(piece)),
                Effect::RollBack => self.roll_back(piece, Data::Wanted, half),
                Effect::PutBack => self.put_back(piece, status, half),
                _ => {}
            }
        }
        if fails {
            return Some(Event::Failed(transient()));
        }
        Some(match effect {
            Effect::Announce => return None,
            Effect::Wait { until } => {
                self.now = self.now.max(*until);
                Event::RetryDue
            }
            Effect::Preflight => Event::PreflightPassed(Box::new(self.facts(order))),
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
            Effect::Prepare => Event::Prepared(prepared),
            Effect::SetAside => Event::SetAside,
            Effect::Place => Event::Placed,
            Effect::Book => Event::Booked,
            Effect::Safeguard => Event::Safeguarded(safeguarded),
            Effect::RollBack => Event::RolledBack,
            Effect::PutBack => Event::PutBack,
            Effect::Start { replicas } => {
                let holds = self.holds();
                let one_state =
                    [Data::Current, Data::Wanted].iter().any(|data| holds.iter().all(|d| d == data));
                assert!(one_state, "started on a mixture: {holds:?}");
                for volume in (0..self.volumes).map(live) {
                    assert_eq!(
                        self.journal[&volume], self.images[&volume],
                        "started before ceph-csi knew the image"
                    );
                }
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

    fn prepare(&mut self, piece: &Piece<'_>, half: bool) -> ImageRecord {
        if self.undo {
            return piece.incoming.unwrap().clone();
        }
        self.may_change();
        let name = new(&piece.image.name);
        self.images.remove(&name);
        self.made += 1;
        let id = format!("new-{}", self.made);
        self.images.insert(name.clone(), id.clone());
        self.data.insert(id.clone(), if half { Data::Mixture } else { Data::Wanted });
        image(&name, &id)
    }

    /// What the shell does before it writes the journal: the name must mean that image.
    fn note(&mut self, piece: &Piece<'_>, id: &str) {
        self.may_change();
        assert_eq!(
            self.images[&piece.image.name], id,
            "the journal is told of an image that is not in place"
        );
        self.journal.insert(piece.image.name.clone(), id.to_owned());
    }

    fn safeguard(&mut self, piece: &Piece<'_>) -> SnapshotRecord {
        self.may_change();
        let data = self.data[&piece.image.id];
        self.snapshots.entry(piece.image.id.clone()).or_insert(data);
        SnapshotRecord { name: SAFETY.to_owned(), id: 9, size: 1 << 30 }
    }

    /// Overwrites the image.
    fn roll_back(&mut self, piece: &Piece<'_>, data: Data, half: bool) {
        self.may_change();
        let safe = (0..self.volumes).all(|volume| self.snapshots.contains_key(&old(volume)));
        assert!(safe, "overwritten before there is a safety snapshot of each image");
        self.data.insert(piece.image.id.clone(), if half { Data::Mixture } else { data });
    }

    fn put_back(&mut self, piece: &Piece<'_>, status: &RestoreStatus, half: bool) {
        self.may_change();
        if status.method.unwrap() == Method::Rollback {
            if piece.safety_snapshot.is_some() {
                self.roll_back(piece, self.snapshots[&piece.image.id], half);
            } else {
                self.snapshots.remove(&piece.image.id);
            }
            return;
        }
        let made = new(&piece.image.name);
        let id = piece.incoming.map(|image| image.id.clone()).or_else(|| self.images.get(&made).cloned());
        let own = piece.incoming.map_or(made.as_str(), |image| image.name.as_str());
        // One that an earlier try removed is nowhere.
        let id = id.filter(|id| self.name_of(id).is_some());
        if let Some(id) = &id {
            self.give_name(id, own);
        }
        self.give_name(&piece.image.id, &piece.image.name);
        if half {
            return;
        }
        self.note(piece, &piece.image.id);
        if let Some(id) = id.filter(|_| !self.undo) {
            self.images.remove(&made);
            if status.started {
                self.trash.insert(id);
            }
        }
    }
}

/// What happens to the process at an effect, counted in effects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    /// It dies before it performs it.
    Before(usize),
    /// It dies in the middle of it, at the image of the second number.
    Within(usize, usize),
    /// It dies after it, before the event is written down.
    After(usize),
    /// It lives, and somebody asks to put everything back.
    Undo(usize),
}

impl Blow {
    /// Every way to die at the effect `at`.
    fn deaths(at: usize, world: &World) -> impl Iterator<Item = Self> + use<> {
        let within = (0..world.volumes).map(move |image| Self::Within(at, image));
        [Self::Before(at), Self::After(at)].into_iter().chain(within)
    }
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
        let dies_at = blows.iter().find_map(|blow| match blow {
            Blow::Within(effect, image) if *effect == at => Some(*image),
            _ => None,
        });
        let answer = world.perform(effect, &written, order, dies_at);
        if dies_at.is_some() || blows.contains(&Blow::After(at)) {
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
    for volume in (0..world.volumes).map(live) {
        let (told, in_place) = (&world.journal[&volume], &world.images[&volume]);
        assert_eq!(told, in_place, "ceph-csi would delete another image than the one in place");
    }
    match status.phase {
        Phase::Completed => {
            assert!(world.holds().iter().all(|data| *data == Data::Wanted), "{:?}", world.holds());
            assert!(status.failure.is_none());
            check_safety_copies(order, status, world);
        }
        Phase::Failed => {
            assert!(world.holds().iter().all(|data| *data == Data::Current), "the data is not what it was");
            let failure = status.failure.as_ref().unwrap();
            assert!(!failure.reason.is_empty() && !failure.cure.is_empty());
            for (volume, name) in (0..world.volumes).map(|volume| (volume, live(volume))) {
                assert_eq!(world.images[&name], old(volume));
            }
            let wanted = if world.undo { 2 } else { 1 };
            assert_eq!(world.images.len(), wanted * world.volumes, "one is left over: {:?}", world.images);
        }
        other => panic!("{other:?} is no end"),
    }
}

/// What an undo needs is there for every image, and stands in the record.
fn check_safety_copies(order: &Order, status: &RestoreStatus, world: &World) {
    let recorded: Vec<_> = std::iter::once((&status.safety_image, &status.safety_snapshot))
        .chain(status.parts.iter().map(|part| (&part.safety_image, &part.safety_snapshot)))
        .collect();
    assert_eq!(recorded.len(), world.volumes);
    for (volume, (safety_image, safety_snapshot)) in recorded.into_iter().enumerate() {
        let (aside, old) = (aside(&live(volume)), old(volume));
        match order.method {
            Method::Swap => {
                let safety = safety_image.as_ref().unwrap();
                assert_eq!((&safety.name, &safety.id), (&aside, &old));
                assert_eq!(world.images[&aside], old, "the safety copy is gone");
                assert_eq!(world.data[&old], Data::Current);
            }
            Method::Rollback => {
                assert_eq!(world.snapshots[&old], Data::Current, "the safety copy is wrong");
                assert_eq!(safety_snapshot.as_ref().unwrap().name, SAFETY);
            }
        }
    }
    let images = if order.method == Method::Swap { 2 } else { 1 };
    assert_eq!(world.images.len(), images * world.volumes, "one is left over: {:?}", world.images);
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
                for blow in Blow::deaths(at, &world) {
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
            for (failing, mut world) in (0..effects - 1).flat_map(|at| world.failing().map(move |w| (at, w)))
            {
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
        for (failing, mut world) in (0..effects - 1).flat_map(|at| fresh.failing().map(move |w| (at, w))) {
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
                    for blow in Blow::deaths(second, &world) {
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
    let mut world = World { silent: u32::MAX, ..World::several(&order) };
    let (status, _) = run(&order, &mut world, &[]);
    check(&order, &status, &world);
    assert_eq!(status.phase, Phase::Stuck);
    let clones: Vec<String> = (0..SEVERAL).map(|volume| world.images[&live(volume)].clone()).collect();
    let undo = Event::Asked(Request::Undo { token: "undo/1".to_owned() });
    let (status, _) = run_from(&order, &mut world, status, undo, &[]);
    check(&order, &status, &world);
    assert_eq!(status.phase, Phase::Failed);
    let kept = clones.iter().all(|clone| world.trash.contains(clone));
    assert!(kept, "what was written while it answered is lost");
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
    let mut world = World::new(&order).stopped();
    let (status, _) = run(&order, &mut world, &[]);
    check(&order, &status, &world);
    assert_eq!((status.phase, status.started), (Phase::Completed, false));
    assert!(status.conditions.iter().any(|condition| condition.reason == "Stopped"));
}

#[test]
fn a_copy_is_started_and_an_undo_of_it_stops_it_again() {
    let order = swap();
    let mut world = World::new(&order).beside();
    let (status, _) = run(&order, &mut world, &[]);
    check(&order, &status, &world);
    assert_eq!((status.phase, status.started, world.replicas), (Phase::Completed, true, 1));
    assert!(status.conditions.iter().any(|condition| condition.reason == "Sql"));

    let order = undo_of_swap();
    let mut world = World::new(&order).beside();
    let (status, _) = run(&order, &mut world, &[]);
    check(&order, &status, &world);
    assert_eq!((status.phase, status.started, world.replicas), (Phase::Completed, false, 0));
    let stopped = status.conditions.iter().find(|condition| condition.reason == "Stopped").unwrap();
    assert!(stopped.message.contains("as it was before the restore"), "{stopped:?}");
}

#[test]
fn what_is_said_of_another_number_of_images_is_refused() {
    let order = swap();
    let world = World::several(&order);
    let facts = world.facts(&order);
    let status = |phase| RestoreStatus { phase, parts: facts.parts.clone(), ..RestoreStatus::default() };
    let snapshot = SnapshotRecord { name: SAFETY.to_owned(), id: 9, size: 1 << 30 };
    for (phase, event) in [
        (Phase::Preparing, Event::Prepared(vec![image("i", "1"), image("j", "2")])),
        (Phase::Safeguarding, Event::Safeguarded(vec![snapshot])),
    ] {
        let error = next(&order, &status(phase), event, created()).unwrap_err();
        assert_eq!(error.phase, phase);
    }
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
    (0_usize..60, 0_u8..4, 0..SEVERAL).prop_map(|(at, kind, image)| match kind {
        0 => Blow::Before(at),
        1 => Blow::Within(at, image),
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
            for (death, image) in (0..effects).flat_map(|at| (0..world.volumes).map(move |image| (at, image)))
            {
                for good in 0..=effects {
                    let mut world = world.clone();
                    world.done_at_failure = image;
                    world.script = std::iter::repeat_n(false, good).collect();
                    world.script.extend(std::iter::repeat_n(true, WITHOUT_END));
                    let (status, _) = run(&order, &mut world, &[Blow::Within(death, image)]);
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
        done_at_failure in 0..SEVERAL,
        script in proptest::collection::vec(any::<bool>(), 0..30),
        blows in proptest::collection::vec(any_blow(), 0..5),
    ) {
        let order = orders()[which].clone();
        let worlds = World::all(&order);
        let mut world = worlds[standing.index(worlds.len())].clone();
        world.unproven = unproven;
        world.silent = silent;
        world.done_at_failure = done_at_failure;
        world.script = script.into();
        let (status, _) = run(&order, &mut world, &blows);
        check(&order, &status, &world);
    }
}
