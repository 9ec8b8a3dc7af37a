//! A replica that an operator declares to be the truth, while it is copied to.

use tabularium_proto::coordinator::{
    self as wire, WriteKind, finish_duty_response::Disposition, repair_service_client::RepairServiceClient,
};

use crate::{
    duties::{finish_attempt, open, start_copy, succeeded},
    support::*,
};

#[tokio::test(flavor = "multi_thread")]
async fn copies_are_kept_away_from_the_truth() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    let mut repair = RepairServiceClient::new(tabularium_common::grpc::channel(coordinator.grpc_address()));
    let route = create(&mut routing, "a.git").await;
    let begun = routing.begin_write(begin_voted("a.git", WriteKind::Update)).await.unwrap().into_inner();
    let written =
        commit(&mut routing, &begun, &[&begun.participants[0], &begun.participants[1]]).await.unwrap();
    let duty = open(&mut operator, "replication").await.remove(0);
    let (id, chosen) = (duty.duty_id.as_str(), duty.target.clone());
    assert_eq!(chosen, begun.participants[2]);
    let first = start_copy(&mut duties, id, "w").await;

    let node = site.node(&chosen);
    let gate = node.close_fence_gate().await;
    let accept =
        wire::AcceptDataLossRequest { name: Some(name("a.git")), authoritative_storage: chosen.clone() };
    let accepting = repair.accept_data_loss(accept);
    let copying = async {
        eventually("copies are fenced off", || async { (node.fences().len() == 1).then_some(()) }).await;
        // The number of the fence is known, and the worker gets a higher one: its answer was lost, it says.
        let unknown = first.attempt + 1;
        let next = finish_attempt(&mut duties, id, "w", unknown, succeeded(first.generation)).await;
        drop(gate);
        match next {
            Disposition::AnotherRound(work) => work.attempt,
            other => panic!("no other round: {other:?}"),
        }
    };
    let (accepted, second) = tokio::join!(accepting, copying);
    let accepted = accepted.unwrap().into_inner().repository.unwrap();
    assert_eq!((&accepted.primary, accepted.generation), (&chosen, written + 1));
    let fences = node.fences();
    assert!(fences.len() == 2 && fences[0] > first.attempt, "{fences:?} after {}", first.attempt);
    assert!(fences[0] < second && second < fences[1], "{second} is beyond the first of {fences:?}");
    for other in others(&route).iter().chain([&route.primary]).filter(|storage| **storage != chosen) {
        assert_eq!(site.node(other).fences(), [0; 0], "{other} is to be copied to");
    }

    // What the worker says of its copy counts nothing any more, and nobody else is given one.
    let late = finish_attempt(&mut duties, id, "w", second, succeeded(first.generation)).await;
    assert_eq!(late, Disposition::Done(wire::DutyDone {}));
    let after = resolve(&mut routing, "a.git").await.unwrap();
    assert_eq!((&after.primary, after.generation), (&chosen, written + 1));
    assert!(open(&mut operator, "replication").await.iter().all(|duty| duty.target != chosen));
    site.check_consistency().await;
}
