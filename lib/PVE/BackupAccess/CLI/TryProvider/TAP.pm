package PVE::BackupAccess::CLI::TryProvider::TAP;

# Test results in the Test Anything Protocol. Explanations of failures go to standard error, where
# prove shows them.

use v5.36;

use PVE::BackupAccess::CLI::Output qw(say_error say_out);

sub new ($class) {
    STDOUT->autoflush;    # so that results and explanations come in order
    return bless({ count => 0, failed => 0 }, $class);
}

# A test that passes if nothing is wrong. Returns whether it passed.
sub result ($self, $name, $problem = undef) {
    $self->{count}++;
    my $ok = !defined($problem);
    $self->{failed}++ if !$ok;
    say_out(($ok ? 'ok' : 'not ok') . " $self->{count} - " . $name =~ s/#/\\#/gr);
    $self->explain("$name: $problem") if !$ok;
    return $ok;
}

sub skip ($self, $name, $reason) {
    $self->{count}++;
    say_out("ok $self->{count} - $name # SKIP $reason");
    return;
}

sub explain ($self, @texts) {
    say_error(map { "# $_" } map { split(m/\n/, $_) } @texts);
    return;
}

sub note ($self, $text) {
    say_out("# $text");
    return;
}

# Prints the plan. Returns whether all tests passed.
sub finish ($self) {
    say_out("1..$self->{count}");
    $self->explain("failed: $self->{failed} of $self->{count}") if $self->{failed};
    return !$self->{failed};
}

1;
