-- A copy is made in rounds by a worker that holds it under a lease.
--
-- The previous binary may run on. It hands out copies without a lease and ends them after one round; what it leaves out
-- has a default.
ALTER TABLE duties
    -- Until when it is its worker's. Null: of a duty that is not renewed, which is handed on by its age.
    ADD COLUMN lease_until timestamptz,
    -- Of the present round: the number by which nodes tell copies apart, where it is copied from, since when, and whether
    -- the duty holds the repository's write ticket.
    ADD COLUMN copy_attempt bigint,
    ADD COLUMN source text,
    ADD COLUMN round_started_at timestamptz,
    ADD COLUMN under_ticket boolean NOT NULL DEFAULT false,
    -- Since its worker started it: rounds begun, and tickets that were given back unused.
    ADD COLUMN rounds integer NOT NULL DEFAULT 0,
    ADD COLUMN tickets_lost integer NOT NULL DEFAULT 0,
    -- Sources from which a copy failed.
    ADD COLUMN bad_sources text[] NOT NULL DEFAULT '{}',
    -- The lower, the sooner: 0 for what a write left behind, 1 for what was found by looking.
    ADD COLUMN priority smallint NOT NULL DEFAULT 0;
CREATE INDEX duties_lease ON duties (lease_until) WHERE state = 'started';
DROP INDEX duties_pending_due;
CREATE INDEX duties_pending_due ON duties (priority, next_attempt_at) WHERE state = 'pending';

-- The highest number given to a copy onto a replica. Not a column of `replicas`: a copy starts without the locks of a write.
CREATE TABLE copy_attempts (
    repository_id bigint NOT NULL,
    storage text NOT NULL,
    attempt bigint NOT NULL,
    PRIMARY KEY (repository_id, storage)
);

-- For the operator: how attempts at duties ended. Nothing is decided by it.
CREATE TABLE duty_history (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    duty_id uuid NOT NULL,
    kind text NOT NULL,
    repository_id bigint NOT NULL,
    target text NOT NULL,
    worker_id text NOT NULL,
    -- Of a copy.
    copy_attempt bigint,
    source text,
    generation bigint,
    under_ticket boolean NOT NULL,
    -- `done`: the duty was fulfilled. `round`: something was written meanwhile, another round follows.
    outcome text NOT NULL CHECK (outcome IN ('done', 'round', 'failed', 'lost')),
    error text NOT NULL DEFAULT '',
    started_at timestamptz NOT NULL,
    ended_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX duty_history_target ON duty_history (repository_id, target, kind, id);
CREATE INDEX duty_history_ended_at ON duty_history (ended_at);
