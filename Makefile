# The commands of this collection's developers. Each says what it installs before it does; see docs/development.md.
.PHONY: demo test test-fleet lint units integration prove bench bench-fleet bench-side clean

demo:
	tests/demo.sh

test:
	PROVE="$${PROVE:---rounds 4 --seed 1}" tests/run.sh build lint sanity units integration fleet prove

test-fleet:
	tests/run.sh fleet

lint units integration prove bench bench-fleet bench-side:
	tests/run.sh $@

clean:
	rm -rf .cache
