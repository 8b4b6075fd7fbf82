package PVE::BackupAccess::CLI::Progress;

# Shows the progress of a copy on standard error, like the log: as a bar on a terminal, otherwise as
# a line every few seconds.

use v5.36;

use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::CLI::Output qw(one_line say_error share);
use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Try qw(attempt_any);

my $seconds_between = 10;    # lines of progress

# With $is_quiet, only warnings are shown.
sub new ($class, $is_quiet = 0) {
    my $has_bar = !$is_quiet && -t STDERR && !attempt_any { require Term::ProgressBar };
    return bless({ 'has bar' => $has_bar, 'is quiet' => $is_quiet, name => '' }, $class);
}

sub begin ($self, $name, $total) {
    $self->end;
    $self->@{qw(name total began told)} = ($name, $total, now(), now());
    return if !$self->{'has bar'} || !$total;
    $self->{bar} = Term::ProgressBar->new(
        {
            name => one_line($self->label(0)),
            count => $total,
            ETA => 'linear',
            remove => 1,
            fh => \*STDERR,
            silent => 0,
        }
    );
    $self->{bar}->minor(0);
    return;
}

# The label has a constant width, because the layout of the bar is computed once.
sub label ($self, $done) {
    my $seconds = now() - $self->{began};
    my $rate = $seconds > 0.2 ? bytes(int($done / $seconds)) . '/s' : '';
    return sprintf('%s %12s', $self->{name}, $rate);
}

# Takes the number of bytes done. May be called at any rate.
sub update ($self, $name, $done, $total) {
    return if $self->{'is quiet'};
    $self->begin($name, $total) if $name ne $self->{name} || $total != $self->{total};
    if ($self->{bar}) {
        $self->{bar}->name(one_line($self->label($done)));
        $self->{bar}->update($done);
    }
    elsif (!$self->{'has bar'} && now() - $self->{told} >= $seconds_between) {
        $self->{told} = now();
        my $label = $self->label($done) =~ s/\A\Q$name\E\s*//r;
        say_error(
            sprintf(
                '%s: %s of %s (%s) %s',
                $name, bytes($done), bytes($total), share($done, $total), $label
            )
        );
    }
    return;
}

# Prints a line of the log, above the bar.
sub tell ($self, $line) {
    $self->warn($line) if !$self->{'is quiet'};
    return;
}

sub warn ($self, $line) {
    $self->end;
    say_error($line);
    return;
}

sub end ($self) {
    if (my $bar = delete($self->{bar})) {
        print {*STDERR} "\r\e[K";
    }
    $self->{name} = '';
    return;
}

1;
