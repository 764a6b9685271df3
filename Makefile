# The commands of this collection's developers. Each says what it installs before it does; see docs/development.md.
.PHONY: demo test test-between test-fleet build galaxy lint sanity quick units page integration prove bench bench-fleet bench-side bench-back screenshot clean

demo:
	tests/demo.sh

test:
	LIMIT=2400 PROVE="$${PROVE:---rounds 1 --at-most 20 --seed 1}" tests/run.sh build galaxy lint sanity page quick units integration fleet prove

test-between:
	tests/run.sh between

test-fleet:
	tests/run.sh fleet

build galaxy lint sanity quick units page integration prove bench bench-fleet bench-side bench-back screenshot:
	tests/run.sh $@

clean:
	rm -rf .cache
