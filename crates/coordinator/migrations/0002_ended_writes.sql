-- What became of writes whose intent is gone, kept for a while: a router that lost the answer asks again, and one that was
-- stopped meanwhile reports late. No foreign key: it outlives its repository.
CREATE TABLE ended_writes (
    id uuid PRIMARY KEY,
    repository_id bigint NOT NULL,
    -- The primary it went to.
    storage text NOT NULL,
    router_id text NOT NULL,
    -- `committed`: as its router said. `settled`: without its router's word.
    outcome text NOT NULL CHECK (outcome IN ('committed', 'settled')),
    -- Settled, and the node may have gone on since: what it has is looked at again.
    doubtful boolean NOT NULL,
    generation bigint NOT NULL,
    ended_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ended_writes_ended_at ON ended_writes (ended_at) WHERE NOT doubtful;
CREATE INDEX ended_writes_doubtful ON ended_writes (ended_at) WHERE doubtful;

-- When the replica was last made by a copy. A copy made while a write was open may have brought along what the write did.
ALTER TABLE replicas ADD COLUMN copied_at timestamptz;

-- Epoch of the repository when the present attempt started: a copy whose source was fenced meanwhile does not count.
ALTER TABLE duties ADD COLUMN epoch bigint;

-- When a coordinator last named the site as a subscriber. One that nobody names any more holds back no pruning.
ALTER TABLE subscribers ADD COLUMN wanted_at timestamptz NOT NULL DEFAULT now();
