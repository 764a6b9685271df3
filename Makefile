# The commands of this collection's developers. Each says what it installs before it does; see docs/development.md.
.PHONY: demo test test-between test-fleet build galaxy lint sanity quick units integration prove bench bench-fleet bench-side clean

demo:
	tests/demo.sh

test:
	PROVE="$${PROVE:---rounds 3 --seed 1}" tests/run.sh build galaxy lint sanity quick units integration fleet prove

test-between:
	tests/run.sh between

test-fleet:
	tests/run.sh fleet

build galaxy lint sanity quick units integration prove bench bench-fleet bench-side:
	tests/run.sh $@

clean:
	rm -rf .cache
