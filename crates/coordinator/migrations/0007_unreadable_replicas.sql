-- A repository of which no replica can be read is shown to operators.
--
-- The previous binary may run on: it writes nothing of this.
ALTER TABLE replicas
    -- What its node said when it was asked what it holds and nobody else could say either. Null: nothing, or it has said it since.
    ADD COLUMN unreadable text;
CREATE INDEX replicas_unreadable ON replicas (repository_id) WHERE unreadable IS NOT NULL;

-- As before; and what a node could not read does not hold for what has taken its place.
CREATE OR REPLACE FUNCTION replica_behind_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.unreadable := NULL;
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
