-- The objects of every replica are looked through once in a while.
--
-- The previous binary may run on: every column has a default, and it looks through none.
ALTER TABLE replicas
    -- When they are to be looked through next.
    ADD COLUMN check_due_at timestamptz NOT NULL DEFAULT '-infinity',
    -- When they were last found whole.
    ADD COLUMN checked_at timestamptz,
    -- What was found the last time, in git's words. Null: nothing, or the replica has been made again since.
    ADD COLUMN damage text;
-- What comes from now on was read while it came, and what comes on one day is not to be due on one day.
ALTER TABLE replicas ALTER COLUMN check_due_at SET DEFAULT now() + random() * interval '30 days';
CREATE INDEX replicas_check_due_at ON replicas (storage, check_due_at) WHERE NOT behind;
CREATE INDEX replicas_damage ON replicas (repository_id) WHERE damage IS NOT NULL;

-- As before; and what was found of a replica does not hold for the one that has taken its place.
CREATE OR REPLACE FUNCTION replica_behind_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.behind THEN
        NEW.behind_since := now();
    ELSE
        NEW.behind_since := NULL;
        NEW.joining := false;
        IF NEW.damage IS NOT NULL THEN
            NEW.damage := NULL;
            NEW.check_due_at := '-infinity';
        END IF;
    END IF;
    RETURN NEW;
END $$;
