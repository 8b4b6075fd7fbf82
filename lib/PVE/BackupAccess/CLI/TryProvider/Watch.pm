package PVE::BackupAccess::CLI::TryProvider::Watch;

# A proxy of a provider, which passes on every call and records its arguments and its outcome.

use v5.36;

use Exporter qw(import);
use POSIX ();
use Scalar::Util qw(weaken);

use PVE::BackupAccess::CLI::Output qw(say_error);
use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Program qw(new_pipe);
use PVE::BackupAccess::Try qw(deaths_of);

our @EXPORT_OK = qw(@backup_methods @restore_methods);

our @backup_methods = qw(
    job_init
    backup_init
    backup_get_mechanism
    backup_vm_query_incremental
    backup_vm
    backup_cleanup
    backup_handle_log_file
    job_cleanup
);

our @restore_methods = qw(
    restore_get_mechanism
    archive_get_guest_config
    archive_get_firewall_config
    restore_vm_init
    restore_vm_volume_init
    restore_vm_volume_cleanup
    restore_vm_cleanup
);

# The method that runs. If it ends this process, that must not look like a success.
my ($process, $running) = ($$);

END {
    if (defined($running) && $$ == $process) {
        say_error("# $running ended this process: it must return or die");
        $? ||= 1;
    }
}

sub new ($class, $provider) {
    my ($from, $to) = new_pipe();
    $from->blocking(0);
    my %self
        = (provider => $provider, calls => [], files => {}, pid => $$, from => $from, to => $to);
    return bless(\%self, $class);
}

# Calls the code once, before the next call of the method.
sub before ($self, $method, $code) {
    $self->{before}{$method} = $code;
    return;
}

sub pass_on ($self, $in_list, $method, @arguments) {
    (delete($self->{before}{$method}) // sub { })->($self->{provider});
    my $call = { method => $method, arguments => $self->arguments($method, @arguments) };
    push($self->{calls}->@*, $call);
    my $began = now();
    $running = $method;
    my ($death) = deaths_of(
        sub {
            my @result;
            my $run = sub { $self->{provider}->$method(@arguments) };

            # deaths_of has the exception of a signal's handler, this has what the provider made of it.
            my $ok
                = eval { @result = $in_list ? $run->() : scalar($run->()); 1 }; ## bare eval: rethrown
            die $call->{said} = $@ if !$ok;
            $call->{result} = \@result;
        }
    );
    $running = undef;
    $self->end_child($method) if $$ != $self->{pid};
    $call->{seconds} = now() - $began;
    if ($death) {
        $call->{error} = $death->[0];
        die $call->{error};
    }
    return $in_list ? $call->{result}->@* : $call->{result}[0];
}

# A child that the provider forked must not return: there, it would go on with the test.
sub end_child ($self, $method) {
    syswrite($self->{to}, "$method\n");
    POSIX::_exit(0);
}

# The methods from which a forked child returned.
sub returned ($self) {
    sysread($self->{from}, my $names, 4096) or return;
    return split(m/\n/, $names);
}

# The arguments as they are recorded. Of volumes, only weak references to the file handles are kept.
sub arguments ($self, $method, @arguments) {
    return \@arguments if $method ne 'backup_vm';
    my $volumes = splice(@arguments, 2, 1, undef);
    for my $device (grep { $volumes->{$_}{'file-handle'} } keys $volumes->%*) {
        weaken($self->{files}{$device} = $volumes->{$device}{'file-handle'});
    }
    return \@arguments;
}

# The devices whose file handle the provider still holds.
sub kept_files ($self) {
    return grep { defined($self->{files}{$_}) } sort keys $self->{files}->%*;
}

for my $method ('provider_name', @backup_methods, @restore_methods) {
    no strict 'refs';
    *{$method} = sub ($self, @arguments) { $self->pass_on(wantarray, $method, @arguments) };
}

# The calls of a method, oldest first: { method, arguments, result or error, said }.
sub calls ($self, $method) {
    return grep { $_->{method} eq $method } $self->{calls}->@*;
}

1;
